"""Cases of a whole PPO step: sampling, scoring, advantages and updates, as our trainer does them and in plain PyTorch on padded batches.

Both train the same small Qwen2 with a reference and a separate critic, or a value head on the policy's trunk, on the same prompts and in the
same minibatches; so does TRL's trainer, in minibatches of its own, where a version is installed that has one. They draw other tokens; so each
is checked against the plain step in fp64, from the same weights, on the tokens that it drew itself: the plain step in fp32 at small sizes only.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from fastppo import PPOConfig
from fastppo.algorithms.ppo import PPO
from fastppo.bench import floors, trl_ppo_step
from fastppo.bench.clock import PhaseClock
from fastppo.bench.gae import eager as gae
from fastppo.bench.harness import Case, Tensors, WrongResult, relative_error
from fastppo.bench.masked_whiten import eager as masked_whiten
from fastppo.bench.peers import EAGER, OURS, SEPARATE
from fastppo.bench.ppo_loss import eager as ppo_loss
from fastppo.bench.rollout_workload import VOCABULARY, make_model, prompts_of
from fastppo.bench.setting import Setting
from fastppo.evaluation import Evaluation
from fastppo.learner import Learner
from fastppo.model import prepare_model
from fastppo.model.host import on_device
from fastppo.plan import Lengths, plan_epochs
from fastppo.rewards.scores import Scores
from fastppo.roles import Roles
from fastppo.rollout import Engine, Rollout, SamplingParams
from fastppo.targets import Targets
from fastppo.trainer import KEPT_CACHE

ROUNDS, LONG_ROUNDS = 4, 2  # of a step of seconds, and of one of tens of seconds
PER_TOKEN = ("old_logprobs", "values", "advantages", "returns")
# Of a loss, in units of max(|exact|, 1): after AdamW's steps a rounded gradient's sign has moved some weights the other way.
ALLOWED_LOSS_ERROR = 1e-4
CONFIG = PPOConfig(
    reward={"kl_coef": 0.05},
    optimizer={"lr": 1e-4},
    critic={"lr": 1e-4},
    learner={"epochs": 1, "num_minibatches": 4},
)


class Shape(NamedTuple):
    hidden: int
    layers: int
    prompts: int
    shortest: int
    longest: int
    new_tokens: int
    samples: int = 1
    shared_trunk: bool = False
    """The critic is a value head on the policy's trunk."""

    @property
    def sequences(self) -> int:
        return self.prompts * self.samples

    @property
    def name(self) -> str:
        lengths = self.longest if self.shortest == self.longest else f"{self.shortest}-{self.longest}"
        samples = f", {self.samples} samples each" if self.samples > 1 else ""
        trunk = ", shared trunk" if self.shared_trunk else ""
        return f"{self.prompts} prompts of {lengths}{samples}, {self.new_tokens} new, a step{trunk}"


def score(completion: list[int], vocabulary: int = VOCABULARY) -> float:
    """Share of the tokens in the lower half of the vocabulary."""
    return sum(token < vocabulary // 2 for token in completion) / len(completion)


def noisy(module: nn.Module, spread: float, seed: int) -> None:
    """Moves the weights, the same way whenever asked: else policy and reference agree, and a new critic says 0."""
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, device=device), alpha=spread)


def make_roles(model: PreTrainedModel, *, critic: str, with_reference: bool) -> Roles:
    """Networks that differ from each other, as in the middle of a run."""
    roles = Roles(prepare_model(model), critic=critic, with_reference=with_reference)
    noisy(roles.policy, 0.01, seed=1)
    noisy(roles.value_head if critic == "shared" else roles.critic.head, 0.05, seed=2)
    return roles


def minibatches(shape: Shape) -> list[list[int]]:
    """The sequences of each optimizer step."""
    groups = [i // shape.samples for i in range(shape.sequences)]
    lengths = Lengths([1] * shape.sequences, [0] * shape.sequences, groups)
    plan = plan_epochs(lengths, epochs=1, num_minibatches=CONFIG.learner.num_minibatches, max_tokens=1 << 30, seed=0)
    return [[index for indices in minibatch for index in indices] for epoch in plan for minibatch in epoch]


class FusedStep:
    """What `PPOTrainer` does in a step, on token ids, without its records."""

    def __init__(self, shape: Shape, model: PreTrainedModel | None = None, config: PPOConfig | None = None) -> None:
        self.shape, config = shape, config or CONFIG
        model = make_model.__wrapped__(shape.hidden, shape.layers) if model is None else model
        self.algorithm = PPO(config)
        critic = "shared" if shape.shared_trunk else "separate"
        self.roles = make_roles(model, critic=critic, with_reference="reference" in self.algorithm.needs)
        kept = KEPT_CACHE if model.device.type == "cuda" else False
        self.engine = Engine(model, max_batch_size=shape.sequences, keep_cache=kept)
        settings = {"optimizer": config.optimizer, "critic": config.critic, "config": config.learner}
        self.learner = Learner(self.roles, **settings, total_steps=config.total_steps)
        self.phases: dict[str, float] = {}

    def __call__(self, x: Tensors) -> Tensors:
        model = self.roles.policy
        clock = PhaseClock(model.device)
        new = self.shape.new_tokens
        sampling = SamplingParams(n=self.shape.samples, max_new_tokens=new, min_new_tokens=new)
        rollout = self.engine.generate(prompts_of(x), sampling, value_head=self.roles.value_head)
        clock.end("sampling")
        scored = [score(completion, model.config.vocab_size) for completion in rollout.completions()]
        scores = Scores(on_device(scored, model.device, torch.float32), {})
        plan = self.learner.plan(rollout, seed=0)
        evaluation = self.roles.evaluate(rollout, self.algorithm.needs, plan)
        targets = self.algorithm.credit(rollout, evaluation, scores)
        clock.end("scoring")
        metrics = self.algorithm.update(self.learner, rollout, evaluation, targets, plan)
        clock.end("update")
        self.phases = clock.seconds
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
        return losses_of(metrics) | {name: x.view(-1, self.shape.new_tokens) for name, x in actions.items()}


class SeparateStep(FusedStep):
    """Ours with a critic of its own, beside those with a shared trunk."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape._replace(shared_trunk=False))

    def __call__(self, x: Tensors) -> Tensors:
        return super().__call__(x) | {"separate_critic": torch.tensor(True)}


def losses_of(metrics: dict[str, float]) -> Tensors:
    return {"losses": torch.tensor([metrics["loss/policy_avg"], metrics["loss/value_avg"]])}


class PlainStep:
    """The same step with Transformers' `generate`, left-padded batches, whole logits and PyTorch's own functions.

    P longest prompt, N new tokens: sequences are [B, P + N], of which the last N are the completions. `at_a_time`: so many sequences of a
    minibatch go through the networks together, None all.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.float32, at_a_time: int | None = None) -> None:
        self.shape, self.at_a_time = shape, at_a_time
        self.phases: dict[str, float] = {}
        self.reference = make_model.__wrapped__(shape.hidden, shape.layers)
        self.policy = copy.deepcopy(self.reference)
        self.critic = None if shape.shared_trunk else copy.deepcopy(self.reference.model)
        self.value_head = nn.Linear(shape.hidden, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        noisy(self.policy, 0.01, seed=1)
        noisy(self.value_head, 0.05, seed=2)
        critic = [self.value_head] if shape.shared_trunk else [self.critic, self.value_head]
        for module in (self.reference, self.policy, *critic):
            module.to(dtype)
        self.groups = [list(self.policy.parameters()), [p for module in critic for p in module.parameters()]]
        rates = (CONFIG.optimizer.lr, CONFIG.critic.lr)
        self.optimizers = [
            torch.optim.AdamW(group, lr=lr, weight_decay=0.0) for group, lr in zip(self.groups, rates, strict=True)
        ]

    def __call__(self, x: Tensors) -> Tensors:
        clock = PhaseClock()
        completions = self.sample(x)
        clock.end("sampling")
        batch = self.experience(x, completions)
        clock.end("scoring")
        losses = self.update(batch)
        clock.end("update")
        self.phases = clock.seconds
        return self._outputs(completions, batch, losses)

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
        batch = self.experience(x, completions)
        return self._outputs(completions, batch, self.update(batch, chosen))

    def experience(self, x: Tensors, completions: Tensor) -> Tensors:
        """What the update is given."""
        sequences = self.sequences(x, completions)
        return sequences | self._experience(**sequences)

    def sequences(self, x: Tensors, completions: Tensor) -> Tensors:
        """`tokens` and `attention`, int64 [B, P + N]"""
        tokens, mask = self._left_padded(x)
        mask = torch.cat((mask, torch.ones_like(completions)), 1)
        return {"tokens": torch.cat((tokens, completions), 1), "attention": mask}

    def update(self, batch: Tensors, chosen: list[list[int]] | None = None) -> Tensor:
        """An optimizer step for each of the minibatches; the means of policy and value loss."""
        losses = torch.zeros(2, dtype=batch["values"].dtype)
        chosen = chosen or minibatches(self.shape)
        for indices in chosen:
            losses += self._update({name: value[indices] for name, value in batch.items()})
        return losses / len(chosen)

    def _outputs(self, completions: Tensor, batch: Tensors, losses: Tensor) -> Tensors:
        return {"completions": completions, "losses": losses} | {name: batch[name] for name in PER_TOKEN}

    def _left_padded(self, x: Tensors) -> tuple[Tensor, Tensor]:
        """Each prompt once for each of its samples."""
        longest = self.shape.longest
        rows = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts_of(x)])
        mask = (torch.arange(longest) >= longest - x["lengths"][:, None]).long()
        return rows.repeat_interleave(self.shape.samples, 0), mask.repeat_interleave(self.shape.samples, 0)

    @torch.no_grad()
    def _experience(self, tokens: Tensor, attention: Tensor) -> Tensors:
        """Old and reference log-probs, values, KL-shaped rewards, advantages and returns, each [B, N]."""
        old, values = self._logprobs_and_values(tokens, attention)
        rewards = -CONFIG.reward.kl_coef * (old - self._logprobs(self.reference, tokens, attention))
        completions = tokens[:, -self.shape.new_tokens :].tolist()
        rewards[:, -1] += torch.tensor([score(completion) for completion in completions])
        advantages, returns = gae(rewards, values, gamma=CONFIG.advantage.gamma, lam=CONFIG.advantage.gae_lambda)
        whitened = masked_whiten(advantages, torch.ones_like(advantages, dtype=torch.bool))
        return {"old_logprobs": old, "values": values, "advantages": whitened, "returns": returns}

    def _update(self, batch: Tensors) -> Tensor:
        """One optimizer step; (policy loss, value loss)."""
        count = len(batch["tokens"])
        losses = torch.zeros(2, dtype=batch["values"].dtype)
        for some in torch.arange(count).split(self.at_a_time or count):
            part = self._losses({name: value[some] for name, value in batch.items()}) * (len(some) / count)
            (part[0] + CONFIG.critic.vf_coef * part[1]).backward()
            losses += part.detach()
        for group, optimizer in zip(self.groups, self.optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(group, CONFIG.optimizer.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        return losses

    def _losses(self, batch: Tensors) -> Tensor:
        """[2]: policy loss and value loss."""
        mask = torch.ones_like(batch["values"], dtype=torch.bool)
        logprobs, values = self._logprobs_and_values(batch["tokens"], batch["attention"])
        clip = {"clip_low": CONFIG.loss.clip_low, "clip_high": CONFIG.loss.clip_high}
        (policy,) = ppo_loss(logprobs, batch["old_logprobs"], batch["advantages"], mask, **clip)
        clipped = batch["values"] + (values - batch["values"]).clamp(
            -CONFIG.critic.value_clip, CONFIG.critic.value_clip
        )
        errors = (values - batch["returns"]).square(), (clipped - batch["returns"]).square()
        value = 0.5 * torch.maximum(*errors).mean()
        return torch.stack((policy, value))

    def _logprobs_and_values(self, tokens: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N] each; of a shared trunk in one pass."""
        if self.critic is not None:
            return self._logprobs(self.policy, tokens, attention), self._values(tokens, attention)
        states = self._states_before(self.policy.model, tokens, attention)
        logprobs = log_softmax_gather(self.policy.lm_head(states), tokens[:, -self.shape.new_tokens :])
        return logprobs, self.value_head(states).squeeze(-1)

    def _logprobs(self, model: PreTrainedModel, tokens: Tensor, attention: Tensor) -> Tensor:
        """[B, N]: the logits of a position score the token after it."""
        new = self.shape.new_tokens
        logits = model(
            tokens, attention_mask=attention, position_ids=positions(attention), logits_to_keep=new + 1
        ).logits
        return log_softmax_gather(logits[:, :-1], tokens[:, -new:])

    def _values(self, tokens: Tensor, attention: Tensor) -> Tensor:
        """[B, N]: of the state before each new token."""
        return self.value_head(self._states_before(self.critic, tokens, attention)).squeeze(-1)

    def _states_before(self, trunk: nn.Module, tokens: Tensor, attention: Tensor) -> Tensor:
        """[B, N, H]: of each new token."""
        out = trunk(tokens, attention_mask=attention, position_ids=positions(attention))
        return out.last_hidden_state[:, -self.shape.new_tokens - 1 : -1]


def positions(attention: Tensor) -> Tensor:
    return (attention.cumsum(1) - 1).clamp_min(0)


def log_softmax_gather(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def checked(shape: Shape) -> Callable[[Tensors, Tensors, Tensors], float]:
    """Compares a provider's first step with the plain one in fp64 on the same completions."""

    def compare(x: Tensors, outputs: Tensors, exact: Tensors) -> float:
        asked = shape._replace(shared_trunk=False) if "separate_critic" in outputs else shape
        completions, chosen = (
            outputs[name].tolist() if name in outputs else None for name in ("completions", "minibatches")
        )
        expected = exact_step(asked, json.dumps([prompts_of(x), completions, chosen]))
        off = loss_error(outputs["losses"], expected["losses"])
        return max(
            [off, *(relative_error(name, outputs[name], expected[name]) for name in PER_TOKEN if name in outputs)]
        )

    return compare


@lru_cache(maxsize=4)
def exact_step(shape: Shape, learned_from: str) -> Tensors:
    """The plain step in fp64. learned_from: JSON of prompts, completions and the minibatches, which cases have in common."""
    prompts, completions, chosen = json.loads(learned_from)
    tokens = torch.tensor([prompt + [0] * (shape.longest - len(prompt)) for prompt in prompts])
    x = {"tokens": tokens, "lengths": torch.tensor([len(prompt) for prompt in prompts])}
    return PlainStep(shape, torch.float64).learn(x, torch.tensor(completions), chosen)


def loss_error(found: Tensor, exact: Tensor) -> float:
    """In units of max(|exact|, 1); WrongResult where rounding does not explain it."""
    off = ((found.double() - exact).abs() / exact.abs().clamp_min(1)).max().item()
    if not off <= ALLOWED_LOSS_ERROR:
        raise WrongResult(f"losses are {found.tolist()}, expected {exact.tolist()}", off)
    return off


class Lazy:
    """A step whose networks are made when it is first called, so that listing the cases costs nothing."""

    def __init__(self, kind: Callable[[Shape], Callable[[Tensors], Tensors]], shape: Shape) -> None:
        self.kind, self.shape, self.step = kind, shape, None

    def __call__(self, x: Tensors) -> Tensors:
        if self.step is None:
            self.step = self.kind(self.shape)
        return self.step(x)

    @property
    def phases(self) -> dict[str, float] | None:
        """Seconds of the last call's."""
        return self.step and self.step.phases


def make_prompts(shape: Shape, generator: torch.Generator, vocabulary: int = VOCABULARY) -> Tensors:
    """int64: `tokens` [prompts, longest], of which each row's first `lengths` [prompts] are a prompt."""
    lengths = torch.randint(shape.shortest, shape.longest + 1, (shape.prompts,), generator=generator)
    return {
        "tokens": torch.randint(vocabulary, (shape.prompts, shape.longest), generator=generator),
        "lengths": lengths,
    }


def make_case(shape: Shape, quick: bool) -> Case:
    steps = {OURS: FusedStep, EAGER: PlainStep}
    if shape.shared_trunk:
        steps[SEPARATE] = SeparateStep
    if shape.samples == 1 and trl_ppo_step.is_installed():
        steps["trl"] = lambda shape: trl_ppo_step.TRLStep(PlainStep(shape), score, CONFIG)
    model, sizes = make_model(shape.hidden, shape.layers), floor_sizes(shape)
    return Case(
        op="ppo_step",
        name=shape.name,
        inputs=lambda generator: make_prompts(shape, generator),
        providers={name: Lazy(kind, shape) for name, kind in steps.items()},
        exact=lambda x: {},
        compare=checked(shape),
        work=floors.ppo_step(model, *sizes, CONFIG.learner.num_minibatches, shared_trunk=shape.shared_trunk),
        phase_flops=floors.ppo_step_flops(model, *sizes, shared_trunk=shape.shared_trunk),
        rounds=ROUNDS if shape.samples == 1 else LONG_ROUNDS,
        unchecked=() if quick else (EAGER, SEPARATE),
    )


def floor_sizes(shape: Shape) -> tuple[int, int, int, int]:
    return shape.prompts, shape.samples, shape.shortest, shape.new_tokens


QUICK = Shape(32, 1, 8, 2, 8, 8), Shape(32, 1, 4, 16, 16, 8, samples=4)
USUAL = Shape(256, 2, 32, 12, 48, 32), Shape(128, 2, 16, 256, 256, 64, samples=8)


def cases(setting: Setting) -> list[Case]:
    single, sampled = QUICK if setting.quick else USUAL
    return [make_case(shape, setting.quick) for shape in (single, sampled, sampled._replace(shared_trunk=True))]
