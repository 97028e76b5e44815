"""Case of a whole PPO step: sampling, scoring, advantages and updates, as our trainer does them and in plain PyTorch on padded batches.

Both train the same small Qwen2 with a reference and a separate critic, on the same prompts and in the same minibatches; so does TRL's
trainer, in minibatches of its own, where a version is installed that has one. They draw other tokens; so each is checked against the
plain step in fp64, from the same weights, on the tokens that it drew itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from fastppo import PPOConfig
from fastppo.algorithms.ppo import PPO
from fastppo.bench import floors, trl_ppo_step
from fastppo.bench.gae import eager as gae
from fastppo.bench.harness import Case, Tensors, WrongResult, relative_error
from fastppo.bench.masked_whiten import eager as masked_whiten
from fastppo.bench.ppo_loss import eager as ppo_loss
from fastppo.bench.rollout_workload import VOCABULARY, make_model, prompts_of
from fastppo.bench.setting import Setting
from fastppo.evaluation import Evaluation
from fastppo.learner import Learner
from fastppo.model import prepare_model
from fastppo.plan import Lengths, plan_epochs
from fastppo.rewards.scores import Scores
from fastppo.roles import Roles
from fastppo.rollout import Engine, Rollout, SamplingParams
from fastppo.targets import Targets

ROUNDS, LONG_ROUNDS = 4, 2  # of a step of seconds, and of one of tens of seconds
PER_TOKEN = ("old_logprobs", "values", "advantages", "returns")
# Of a loss, in units of max(|exact|, 1): after AdamW's steps a rounded gradient's sign has moved some weights the other way.
ALLOWED_LOSS_ERROR = 1e-4
CONFIG = PPOConfig(
    reward={"kl_coef": 0.05},
    optimizer={"lr": 1e-4},
    critic={"lr": 1e-4},
    learner={"epochs": 1, "num_minibatches": 4, "tokens_per_microbatch": 1024},
)


class Shape(NamedTuple):
    hidden: int
    layers: int
    prompts: int
    shortest: int
    longest: int
    new_tokens: int
    samples: int = 1

    @property
    def sequences(self) -> int:
        return self.prompts * self.samples

    @property
    def name(self) -> str:
        lengths = self.longest if self.shortest == self.longest else f"{self.shortest}-{self.longest}"
        samples = f", {self.samples} samples each" if self.samples > 1 else ""
        return f"{self.prompts} prompts of {lengths}{samples}, {self.new_tokens} new, a step"


def score(completion: list[int]) -> float:
    """Share of the tokens in the lower half of the vocabulary."""
    return sum(token < VOCABULARY // 2 for token in completion) / len(completion)


def noisy(module: nn.Module, spread: float, seed: int) -> None:
    """Moves the weights, the same way whenever asked: else policy and reference agree, and a new critic says 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=spread)


def minibatches(shape: Shape) -> list[list[int]]:
    """The sequences of each optimizer step."""
    groups = [i // shape.samples for i in range(shape.sequences)]
    lengths = Lengths([1] * shape.sequences, [0] * shape.sequences, groups)
    plan = plan_epochs(lengths, epochs=1, num_minibatches=CONFIG.learner.num_minibatches, max_tokens=1 << 30, seed=0)
    return [[index for indices in minibatch for index in indices] for epoch in plan for minibatch in epoch]


class FusedStep:
    """What `PPOTrainer` does in a step, on token ids, without its records."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        model = prepare_model(make_model.__wrapped__(shape.hidden, shape.layers))
        self.algorithm = PPO(CONFIG)
        self.roles = Roles(model, with_reference="reference" in self.algorithm.needs)
        noisy(self.roles.policy, 0.01, seed=1)
        noisy(self.roles.critic.head, 0.05, seed=2)
        self.engine = Engine(model, max_batch_size=shape.sequences)
        settings = {"optimizer": CONFIG.optimizer, "critic": CONFIG.critic, "config": CONFIG.learner}
        self.learner = Learner(self.roles, **settings, total_steps=CONFIG.total_steps)

    def __call__(self, x: Tensors) -> Tensors:
        new = self.shape.new_tokens
        sampling = SamplingParams(n=self.shape.samples, max_new_tokens=new, min_new_tokens=new)
        rollout = self.engine.generate(prompts_of(x), sampling)
        scores = Scores(torch.tensor([score(completion) for completion in rollout.completions()]), {})
        plan = self.learner.plan(rollout, seed=0)
        evaluation = self.roles.evaluate(rollout, self.algorithm.needs, plan)
        targets = self.algorithm.credit(rollout, evaluation, scores)
        metrics = self.algorithm.update(self.learner, rollout, evaluation, targets, plan)
        return self._outputs(rollout, evaluation, targets, metrics)

    def _outputs(
        self, rollout: Rollout, evaluation: Evaluation, targets: Targets, metrics: dict[str, float]
    ) -> Tensors:
        actions = {
            "completions": rollout.tokens[rollout.actions],
            "old_logprobs": evaluation.logprobs,
            "values": evaluation.values,
            "advantages": targets.advantages,
            "returns": targets.returns,
        }
        losses = torch.tensor([metrics["loss/policy_avg"], metrics["loss/value_avg"]])
        return {"losses": losses} | {name: x.view(-1, self.shape.new_tokens) for name, x in actions.items()}


class PlainStep:
    """The same step with Transformers' `generate`, left-padded batches, whole logits and PyTorch's own functions.

    P longest prompt, N new tokens: sequences are [B, P + N], of which the last N are the completions.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.float32) -> None:
        self.shape = shape
        self.reference = make_model.__wrapped__(shape.hidden, shape.layers)
        self.policy = copy.deepcopy(self.reference)
        self.critic, self.value_head = copy.deepcopy(self.reference.model), nn.Linear(shape.hidden, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        noisy(self.policy, 0.01, seed=1)
        noisy(self.value_head, 0.05, seed=2)
        for module in (self.reference, self.policy, self.critic, self.value_head):
            module.to(dtype)
        self.groups = [
            list(self.policy.parameters()),
            [*self.critic.parameters(), *self.value_head.parameters()],
        ]
        rates = (CONFIG.optimizer.lr, CONFIG.critic.lr)
        self.optimizers = [
            torch.optim.AdamW(group, lr=lr, weight_decay=0.0) for group, lr in zip(self.groups, rates, strict=True)
        ]

    def __call__(self, x: Tensors) -> Tensors:
        return self.learn(x, self.sample(x))

    @torch.no_grad()
    def sample(self, x: Tensors) -> Tensor:
        """int64 [B, N]"""
        tokens, mask = self._left_padded(x)
        new = self.shape.new_tokens
        config = GenerationConfig(
            do_sample=True, top_k=0, min_new_tokens=new, max_new_tokens=new, pad_token_id=0, eos_token_id=None
        )
        return self.policy.generate(tokens, attention_mask=mask, generation_config=config)[:, tokens.shape[1] :]

    def learn(self, x: Tensors, completions: Tensor, chosen: list[list[int]] | None = None) -> Tensors:
        """Experience from given completions, and updates in the `chosen` minibatches."""
        tokens, mask = self._left_padded(x)
        tokens, mask = torch.cat((tokens, completions), 1), torch.cat((mask, torch.ones_like(completions)), 1)
        batch = {"tokens": tokens, "attention": mask} | self._experience(tokens, mask)
        losses = torch.zeros(2, dtype=batch["values"].dtype)
        chosen = chosen or minibatches(self.shape)
        for indices in chosen:
            losses += self._update({name: value[indices] for name, value in batch.items()})
        return {"completions": completions, "losses": losses / len(chosen)} | {name: batch[name] for name in PER_TOKEN}

    def _left_padded(self, x: Tensors) -> tuple[Tensor, Tensor]:
        """Each prompt once for each of its samples."""
        longest = self.shape.longest
        rows = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts_of(x)])
        mask = (torch.arange(longest) >= longest - x["lengths"][:, None]).long()
        return rows.repeat_interleave(self.shape.samples, 0), mask.repeat_interleave(self.shape.samples, 0)

    @torch.no_grad()
    def _experience(self, tokens: Tensor, attention: Tensor) -> Tensors:
        """Old and reference log-probs, values, KL-shaped rewards, advantages and returns, each [B, N]."""
        old, values = self._logprobs(self.policy, tokens, attention), self._values(tokens, attention)
        rewards = -CONFIG.reward.kl_coef * (old - self._logprobs(self.reference, tokens, attention))
        completions = tokens[:, -self.shape.new_tokens :].tolist()
        rewards[:, -1] += torch.tensor([score(completion) for completion in completions])
        advantages, returns = gae(rewards, values, gamma=CONFIG.advantage.gamma, lam=CONFIG.advantage.gae_lambda)
        whitened = masked_whiten(advantages, torch.ones_like(advantages, dtype=torch.bool))
        return {"old_logprobs": old, "values": values, "advantages": whitened, "returns": returns}

    def _update(self, batch: Tensors) -> Tensor:
        """One optimizer step; (policy loss, value loss)."""
        mask = torch.ones_like(batch["values"], dtype=torch.bool)
        logprobs = self._logprobs(self.policy, batch["tokens"], batch["attention"])
        values = self._values(batch["tokens"], batch["attention"])
        clip = {"clip_low": CONFIG.loss.clip_low, "clip_high": CONFIG.loss.clip_high}
        (policy,) = ppo_loss(logprobs, batch["old_logprobs"], batch["advantages"], mask, **clip)
        clipped = batch["values"] + (values - batch["values"]).clamp(
            -CONFIG.critic.value_clip, CONFIG.critic.value_clip
        )
        errors = (values - batch["returns"]).square(), (clipped - batch["returns"]).square()
        value = 0.5 * torch.maximum(*errors).mean()
        (policy + CONFIG.critic.vf_coef * value).backward()
        for group, optimizer in zip(self.groups, self.optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(group, CONFIG.optimizer.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        return torch.stack((policy.detach(), value.detach()))

    def _logprobs(self, model: PreTrainedModel, tokens: Tensor, attention: Tensor) -> Tensor:
        """[B, N]: the logits of a position score the token after it."""
        new = self.shape.new_tokens
        logits = model(
            tokens, attention_mask=attention, position_ids=positions(attention), logits_to_keep=new + 1
        ).logits
        return log_softmax_gather(logits[:, :-1], tokens[:, -new:])

    def _values(self, tokens: Tensor, attention: Tensor) -> Tensor:
        """[B, N]: of the state before each new token."""
        out = self.critic(tokens, attention_mask=attention, position_ids=positions(attention))
        return self.value_head(out.last_hidden_state[:, -self.shape.new_tokens - 1 : -1]).squeeze(-1)


def positions(attention: Tensor) -> Tensor:
    return (attention.cumsum(1) - 1).clamp_min(0)


def log_softmax_gather(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def checked(shape: Shape) -> Callable[[Tensors, Tensors, Tensors], float]:
    """Compares a provider's first step with the plain one in fp64 on the same completions."""

    def compare(x: Tensors, outputs: Tensors, exact: Tensors) -> float:
        chosen = outputs["minibatches"].tolist() if "minibatches" in outputs else None
        expected = PlainStep(shape, torch.float64).learn(x, outputs["completions"], chosen)
        found = outputs["losses"].double()
        off = ((found - expected["losses"]).abs() / expected["losses"].abs().clamp_min(1)).max().item()
        if not off <= ALLOWED_LOSS_ERROR:
            raise WrongResult(f"losses are {found.tolist()}, expected {expected['losses'].tolist()}", off)
        return max(
            [off, *(relative_error(name, outputs[name], expected[name]) for name in PER_TOKEN if name in outputs)]
        )

    return compare


class Lazy:
    """A step whose networks are made when it is first called, so that listing the cases costs nothing."""

    def __init__(self, kind: Callable[[Shape], Callable[[Tensors], Tensors]], shape: Shape) -> None:
        self.kind, self.shape, self.step = kind, shape, None

    def __call__(self, x: Tensors) -> Tensors:
        if self.step is None:
            self.step = self.kind(self.shape)
        return self.step(x)


def make_case(shape: Shape) -> Case:
    def inputs(generator: torch.Generator) -> Tensors:
        lengths = torch.randint(shape.shortest, shape.longest + 1, (shape.prompts,), generator=generator)
        tokens = torch.randint(VOCABULARY, (shape.prompts, shape.longest), generator=generator)
        return {"tokens": tokens, "lengths": lengths}

    steps = {"fastppo": FusedStep, "eager": PlainStep}
    if shape.samples == 1 and trl_ppo_step.is_installed():
        steps["trl"] = lambda shape: trl_ppo_step.TRLStep(PlainStep(shape), score, CONFIG)
    sizes = shape.prompts, shape.samples, shape.shortest, shape.new_tokens
    return Case(
        op="ppo_step",
        name=shape.name,
        inputs=inputs,
        providers={name: Lazy(kind, shape) for name, kind in steps.items()},
        exact=lambda x: {},
        compare=checked(shape),
        work=floors.ppo_step(make_model(shape.hidden, shape.layers), *sizes, CONFIG.learner.num_minibatches),
        rounds=ROUNDS if shape.samples == 1 else LONG_ROUNDS,
    )


def cases(setting: Setting) -> list[Case]:
    if setting.quick:
        return [make_case(Shape(32, 1, 8, 2, 8, 8)), make_case(Shape(32, 1, 4, 16, 16, 8, samples=4))]
    return [make_case(Shape(256, 2, 32, 12, 48, 32)), make_case(Shape(128, 2, 16, 256, 256, 64, samples=8))]
