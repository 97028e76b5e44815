"""`fastppo critic`: pretrains a critic on stored rollouts, so that the first steps of a PPO run have values that mean something.

The policy that drew the rollouts is taken as it was, and each of its states learns the return that followed it: γ^k times the score (with λ = 1,
nothing is bootstrapped). Value pretraining of VC-PPO, Yuan et al. 2025, arXiv:2503.01491.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastppo.algorithms.advantages import rewards_to_go
from fastppo.algorithms.ppo import PPO
from fastppo.config import LossConfig, TrackingConfig
from fastppo.console import Reporter
from fastppo.critics import critic_on, require_same_tokenizer, write_critic
from fastppo.data import PromptSampler
from fastppo.errors import TrainingError
from fastppo.evaluation import Evaluation
from fastppo.evaluation_config import EvaluationConfig
from fastppo.interruption import Interruption
from fastppo.learner import Learner, NonFiniteUpdates
from fastppo.metrics import explained_variance
from fastppo.model import Critic, context_length, load_model, load_named_tokenizer, prepare_model, resolve_device
from fastppo.plan import Lengths, Microbatch, Minibatch, plan_epochs, split_microbatches
from fastppo.recipe_config import Recipe
from fastppo.roles import Outputs, critic_outputs
from fastppo.rollout import Rollout
from fastppo.run_folder import MODEL, RunFolder, check_usable, read_metrics
from fastppo.run_loop import RunLoop
from fastppo.run_state import RunState, model_shape, token_sha256
from fastppo.stored_rollouts import Limits, StoredRollout, as_rollout, read_rollouts
from fastppo.targets import Targets

HELD_OUT_SHARE = 0.1  # of the prompts
EXPLAINED, LOSS = "val/explained_var", "loss/value_avg"

Note = Callable[[str], None]


class Pretrained(NamedTuple):
    before: float
    """Explained variance of the returns of the held-out completions, by the critic as it began; 0 is what a constant explains."""
    after: float
    held_out: int
    """Completions that it was not trained on."""
    folder: Path
    """What `critic.model` may be."""


def train_critic(
    recipe: Recipe, rollouts: Sequence[str | Path], out: str | Path, note: Note = print, *, resume: bool = False
) -> Pretrained:
    """Train the separate critic that `recipe` describes on stored rollouts, and write its folder `model` with the records of a run to `out`.

    A step takes as many completions as a step of the run (`rollout.prompts_per_step` times `samples_per_prompt`), cut into
    `learner.num_minibatches`; `critic.epochs`, or `learner.epochs`, are passes over all of them. A tenth of the prompts is held out. Checkpoints are
    written as `checkpoint` says; signals end it as they end `PPOTrainer.train`.

    Args:
        rollouts: files as `fastppo.stored_rollouts` describes them.
        out: a new or empty folder; with `resume` that of a training which goes on from its newest checkpoint, on a CPU to the same bits.
        note: is told of rows that are passed over, and of each pass.

    Raises:
        ValueError: a setting, a row or a model that cannot be used, or an `out` that holds something, before anything is written.
        CheckpointError: the newest checkpoint in `out` is of other settings or of another model.
        TrainingError: the updates are no longer finite.
        KeyboardInterrupt, SystemExit: a signal has ended it; its steps are saved.
    """
    _require_own_trunk(recipe)
    check_usable(out, resume=resume)
    trainer = CriticTrainer(recipe, rollouts, out, note)
    trainer.train(resume)
    found = [row[EXPLAINED] for row in read_metrics(out) if EXPLAINED in row]
    before, after = (math.nan if value is None else value for value in (found[0], found[-1]))
    return Pretrained(before, after, len(trainer.held_out), trainer.folder / MODEL)


def report(done: Pretrained, recipe: str) -> str:
    """What a training comes to, and how to use it."""
    use = shlex.join(["fastppo", "train", recipe, f"critic.model={done.folder}"])
    return (
        f"done: explained variance {done.after:.3f} on {done.held_out} held-out completions, {done.before:.3f} before; go on with: "
        f"{use}"
    )


def hold_out(stored: Sequence[StoredRollout], seed: int) -> tuple[list[StoredRollout], list[StoredRollout]]:
    """(rows to train on, held-out rows): all rows of a prompt are on one side. ValueError where there is one prompt alone."""
    prompts = list(dict.fromkeys(tuple(row.prompt_ids) for row in stored))
    if len(prompts) < 2:
        raise ValueError(
            "rollouts hold one prompt, expected at least two: one of them is held out to judge the critic on"
        )
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
    chosen = {prompts[i] for i in order[: max(1, int(len(prompts) * HELD_OUT_SHARE))]}
    sides: tuple[list, list] = ([], [])
    for row in stored:
        sides[tuple(row.prompt_ids) in chosen].append(row)
    return sides


class _Alone(nn.Module):
    """A critic as the learner and the losses see the roles of a run."""

    value_head = None

    def __init__(self, critic: Critic) -> None:
        super().__init__()
        self.critic = critic
        self.dtypes = {parameter.dtype for parameter in critic.parameters()}

    def forward(self, rollout: Rollout, *, policy: bool, values: bool) -> Outputs:
        return critic_outputs(self.critic, rollout)

    def trained(self) -> dict[str, nn.Module]:
        return {"critic": self.critic}


def _require_own_trunk(recipe: Recipe) -> None:
    if not recipe.model.name:
        raise ValueError("model.name is empty; the recipe has to set it")
    if recipe.critic.kind != "separate":
        raise ValueError(
            f"critic.kind is {recipe.critic.kind}, expected separate: no other critic can be trained alone"
        )


class CriticTrainer(RunLoop):
    """The run behind `train_critic`, whose arguments it takes."""

    @torch.inference_mode(mode=False)
    def __init__(self, recipe: Recipe, rollouts: Sequence[str | Path], out: str | Path, note: Note) -> None:
        self.tokenizer = load_named_tokenizer(recipe.model.name, recipe.model.tokenizer)
        self.model = _trunk(recipe, self.tokenizer)
        limits = Limits(self.model.get_input_embeddings().weight.shape[0], context_length(self.model))
        stored, others = read_rollouts(rollouts, self.tokenizer, limits)
        if others:
            note(f"passed over {others} of {others + len(stored)} completions, which have no valid score or no token")
        self._rows, self.held_out = hold_out(stored, recipe.seed)
        self.folder = Path(out).expanduser().absolute()
        self._size = recipe.rollout.prompts_per_step * recipe.rollout.samples_per_prompt
        self.steps_per_epoch = -(-len(self._rows) // self._size)
        self.total_steps = (recipe.critic.epochs or recipe.learner.epochs) * self.steps_per_epoch
        self.config = _settings(recipe, str(out), self.steps_per_epoch)
        self.recipe = dataclasses.asdict(recipe) | {"output_dir": str(out)}
        self.reporter = _Passes(self.total_steps, self.steps_per_epoch, note)
        self.learner = Learner(
            _Alone(_critic(self.model, recipe)),
            optimizer=recipe.optimizer,
            critic=self.config.critic,
            config=self.config.learner,
            total_steps=self.total_steps,
            note=note,
        )
        self.sampler = PromptSampler(len(self._rows), self._size, recipe.seed)
        self.state = RunState(self.learner, None, self.sampler, self._identity)
        self._interruption = Interruption()

    @property
    def critic(self) -> Critic:
        return self.learner.roles.critic

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The explained variance of the returns of the held-out completions."""
        rows, budget = self.held_out, self.learner.budget.tokens
        rollout = as_rollout(rows, self.model.device)
        values = torch.zeros(rollout.num_actions, dtype=torch.float32, device=rollout.tokens.device)
        firsts = rollout.action_bounds
        for indices in split_microbatches(range(len(rows)), Lengths.of(rollout), budget):
            self._interruption.check()
            found = critic_outputs(self.critic, rollout.select(indices)).values.float()
            for index, part in zip(indices, found.split([firsts[i + 1] - firsts[i] for i in indices]), strict=True):
                values[firsts[index] : firsts[index + 1]] = part
        return {EXPLAINED: explained_variance(values, returns_of(rows, self.config, rollout.tokens.device))}

    def save_pretrained(self, path: str | Path) -> None:
        """Write the critic's folder."""
        write_critic(self.critic, self.model, self.tokenizer, self.config.critic, path)

    @property
    def _evaluates(self) -> bool:
        return True

    @contextmanager
    def _resources(self) -> Iterator[None]:
        self.reporter.note(f"{len(self._rows)} completions to train on, {len(self.held_out)} held out")
        if warning := PPO(self.config).range_warning(returns_of(self._rows, self.config, self.model.device)):
            self.reporter.note(warning)
        yield

    def _train_step(self, folder: RunFolder) -> None:
        metrics = self.learner.start_step(self.step)
        done = self.step % self.steps_per_epoch * self._size
        rows = [self._rows[i] for i in self.sampler.next(min(self._size, len(self._rows) - done))]
        self.state.begin_update()
        metrics |= self._update(rows, seed=self.config.seed + self.step)
        self.state.step_done(metrics)

    def _update(self, rows: list[StoredRollout], seed: int) -> dict[str, float]:
        """As PPO's update of a critic alone, towards other targets."""
        rollout, algorithm = as_rollout(rows, self.model.device), PPO(self.config)
        returns = returns_of(rows, self.config, rollout.tokens.device)
        # Neither policy nor old values have a say in the loss.
        nothing = torch.zeros_like(returns)
        evaluation = Evaluation(rollout.action_bounds, logprobs=nothing, values=nothing)
        targets = Targets(rollout.action_bounds, advantages=nothing, returns=returns)
        plan = plan_epochs(
            Lengths.of(rollout),
            epochs=1,
            num_minibatches=self.config.learner.num_minibatches,
            max_tokens=self.learner.budget.tokens,
            seed=seed,
        )

        def losses(roles: nn.Module, minibatch: Minibatch, own: list[Microbatch]):
            return algorithm.losses(roles, rollout, evaluation, targets, minibatch, own, train_policy=False)

        try:
            found = self.learner.minimise(losses, plan, Lengths.of(rollout), learned=["critic"])
        except NonFiniteUpdates as error:
            raise TrainingError(f"{error}: lower critic.lr, or look at the scores of the rollouts") from error
        return {name: found[name] for name in (LOSS, "grad_norm/critic", "update/skipped") if name in found}

    def _write_model(self, folder: RunFolder) -> None:
        try:
            self.save_pretrained(folder.path / MODEL)
        except Exception as error:  # Transformers and the disk have many
            raise TrainingError(
                f"{folder.path / MODEL} could not be written: {error}. The weights are in the newest checkpoint of {folder.checkpoints}; once the "
                "cause is gone, a resume (--resume) writes them"
            ) from error

    def _identity(self) -> dict[str, Any]:
        critic = self.config.critic
        return {
            "critic": model_shape(self.critic.trunk),
            "model.dtype": str(self.model.dtype).removeprefix("torch."),
            "critic.head": critic.head,
            "critic.bins": critic.bins,
            "critic.value_range": None if critic.value_range is None else list(critic.value_range),
            "critic.freeze_attention": critic.freeze_attention,
            "seed": self.config.seed,
            "rollout.prompts_per_step * samples_per_prompt": self._size,
            "number of completions": len(self._rows),
            "completions_sha256": _sha256(self._rows),
        }


class _Passes(Reporter):
    """Tells of each pass in a line, and of what there is to say."""

    def __init__(self, total_steps: int, steps_per_epoch: int, note: Note) -> None:
        super().__init__(total_steps, quiet=True)
        self._steps_per_epoch, self._tell = steps_per_epoch, note

    def note(self, text: str) -> None:
        self._tell(text)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        if step % self._steps_per_epoch == 0:
            done, epochs = step // self._steps_per_epoch, self.total_steps // self._steps_per_epoch
            loss = f"loss {metrics[LOSS]:.4f}, " if LOSS in metrics else ""
            self.note(f"pass {done} of {epochs}: {loss}explained variance {metrics[EXPLAINED]:.3f}")


def _trunk(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The prepared language model that the critic is made of."""
    name = recipe.critic.model or recipe.model.name
    if recipe.critic.model is not None:
        require_same_tokenizer(name, tokenizer)
    return prepare_model(load_model(name, dtype=recipe.model.dtype, device=resolve_device(recipe.device)))


def _critic(model: PreTrainedModel, recipe: Recipe) -> Critic:
    critic = critic_on(model, recipe.critic).train()
    if recipe.critic.freeze_attention:
        critic.freeze_attention()
    if recipe.learner.gradient_checkpointing:
        critic.trunk.gradient_checkpointing_enable({"use_reentrant": False})
    return critic


def _settings(recipe: Recipe, out: str, steps_per_epoch: int) -> Recipe:
    """Those of the critic's own run: its loss and micro-batches alone, an evaluation after each pass, nothing that a tracker would take for the run
    of PPO."""
    tokens = recipe.critic.tokens_per_microbatch or recipe.learner.tokens_per_microbatch
    return dataclasses.replace(
        recipe,
        output_dir=out,
        critic=dataclasses.replace(recipe.critic, value_clip=None),
        learner=dataclasses.replace(recipe.learner, tokens_per_microbatch=tokens),
        loss=LossConfig(aggregation=recipe.loss.aggregation),
        evaluation=EvaluationConfig(every=steps_per_epoch),
        tracking=TrackingConfig(),
    )


def _sha256(rows: Sequence[StoredRollout]) -> str:
    """Of all that is learned from them."""
    digest = hashlib.sha256(token_sha256(part for row in rows for part in row[:3]).encode())
    digest.update(repr([(row.score, row.cut_off) for row in rows]).encode())
    return digest.hexdigest()


def returns_of(rows: Sequence[StoredRollout], config: Recipe, device: torch.device) -> Tensor:
    """fp32 [N], in the order of `as_rollout`'s actions: the score, less what is charged for a missing end, discounted from the last action on."""
    counts = torch.tensor([sum(row.action_mask) for row in rows], dtype=torch.int64, device=device)
    bounds = nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    rewards = torch.zeros(int(counts.sum()), dtype=torch.float32, device=device)
    penalty = config.reward.missing_eos_penalty
    scores = [row.score - (penalty if row.cut_off else 0.0) for row in rows]
    rewards[bounds[1:].long() - 1] = torch.tensor(scores, dtype=torch.float32, device=device)
    return rewards_to_go(rewards, bounds, config.advantage.gamma)
