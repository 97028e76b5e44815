"""`fastppo critic`: pretrains a critic on stored rollouts, so that the first steps of a PPO run have values that mean something.

The policy that drew the rollouts is taken as it was, and each of its states learns the return that followed it: γ^k times the score (with λ = 1,
nothing is bootstrapped). Value pretraining of VC-PPO, Yuan et al. 2025, arXiv:2503.01491.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastppo.algorithms.advantages import rewards_to_go
from fastppo.algorithms.ppo import PPO
from fastppo.config import LossConfig
from fastppo.critics import critic_on, require_same_tokenizer, write_critic
from fastppo.errors import TrainingError
from fastppo.evaluation import Evaluation
from fastppo.learner import Learner, NonFiniteUpdates
from fastppo.metrics import explained_variance
from fastppo.model import Critic, context_length, load_model, load_tokenizer, prepare_model, resolve_device
from fastppo.plan import Lengths, Microbatch, Minibatch, plan_epochs, split_microbatches
from fastppo.recipe_config import Recipe
from fastppo.roles import Outputs, critic_outputs
from fastppo.rollout import Rollout
from fastppo.run_folder import MODEL, RunFolder, check_usable
from fastppo.stored_rollouts import Limits, StoredRollout, as_rollout, read_rollouts
from fastppo.targets import Targets

HELD_OUT_SHARE = 0.1  # of the prompts
ORDER_SEED_OFFSET = 0xC0FFEE

Note = Callable[[str], None]


class Pretrained(NamedTuple):
    before: float
    """Explained variance of the returns of the held-out completions, by the critic as it began; 0 is what a constant explains."""
    after: float
    held_out: int
    """Completions that it was not trained on."""
    folder: Path
    """What `critic.model` may be."""


def train_critic(recipe: Recipe, rollouts: Sequence[str | Path], out: str | Path, note: Note = print) -> Pretrained:
    """Train the separate critic that `recipe` describes on stored rollouts, and write its folder `model`, `metrics.jsonl` and `config.yaml` to `out`.

    A step takes as many completions as a step of the run (`rollout.prompts_per_step` times `samples_per_prompt`), cut into
    `learner.num_minibatches`; `critic.epochs`, or `learner.epochs`, are passes over all of them. A tenth of the prompts is held out.

    Args:
        rollouts: files as `fastppo.stored_rollouts` describes them.
        out: a new or empty folder.
        note: is told of rows that are passed over, and of each pass.

    Raises:
        ValueError: a setting, a row or a model that cannot be used, or an `out` that holds something, before anything is written.
        TrainingError: the updates are no longer finite.
    """
    _require_own_trunk(recipe)
    check_usable(out)
    tokenizer = load_tokenizer(recipe.model.tokenizer or recipe.model.name)
    name = recipe.critic.model or recipe.model.name
    if recipe.critic.model is not None:
        require_same_tokenizer(name, tokenizer)
    model = prepare_model(load_model(name, dtype=recipe.model.dtype, device=resolve_device(recipe.device)))
    limits = Limits(model.get_input_embeddings().weight.shape[0], context_length(model))
    stored, others = read_rollouts(rollouts, tokenizer, limits)
    if others:
        note(f"passed over {others} of {others + len(stored)} completions, which have no valid score or no token")
    train, held_out = hold_out(stored, recipe.seed)
    critic = critic_on(model, recipe.critic).train()
    if recipe.critic.freeze_attention:
        critic.freeze_attention()
    if recipe.learner.gradient_checkpointing:
        critic.trunk.gradient_checkpointing_enable({"use_reentrant": False})
    folder = RunFolder(out)
    with folder.lock(note):
        folder.start(dataclasses.asdict(recipe) | {"output_dir": str(out)})
        before, after = _train(critic, recipe, train, held_out, folder, note)
        write_critic(critic, model, tokenizer, recipe.critic, folder.path / MODEL)
    return Pretrained(before, after, len(held_out), folder.path / MODEL)


def report(done: Pretrained, recipe: str) -> str:
    """What a training comes to, and how to use it."""
    return (
        f"done: explained variance {done.after:.3f} on {done.held_out} held-out completions, {done.before:.3f} before; go on with: "
        f"fastppo train {recipe} critic.model={done.folder}"
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


def _train(
    critic: Critic,
    recipe: Recipe,
    train: list[StoredRollout],
    held_out: list[StoredRollout],
    folder: RunFolder,
    note: Note,
) -> tuple[float, float]:
    """(explained variance before, after)"""
    critic_config, loss = (
        dataclasses.replace(recipe.critic, value_clip=None),
        LossConfig(aggregation=recipe.loss.aggregation),
    )
    config = dataclasses.replace(recipe, critic=critic_config, loss=loss)
    size = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    epochs, steps = config.critic.epochs or config.learner.epochs, -(-len(train) // size)
    sections = {"optimizer": config.optimizer, "critic": config.critic, "config": config.learner}
    learner = Learner(_Alone(critic), **sections, total_steps=epochs * steps)
    found = [_explained(critic, held_out, config)]
    note(f"{len(train)} completions to train on, explained variance {found[0]:.3f} on {len(held_out)} held out")
    if warning := PPO(config).range_warning(returns_of(train, config, critic.trunk.device)):
        note(warning)
    for epoch in range(epochs):
        for step, rows in enumerate(_shuffled(train, size, config.seed + epoch), start=epoch * steps):
            metrics = learner.start_step(step) | _update(learner, rows, config, seed=config.seed + step)
            if step == (epoch + 1) * steps - 1:
                found.append(_explained(critic, held_out, config))
                metrics["val/explained_var"] = found[-1]
            folder.log_metrics(step + 1, metrics)
        note(f"pass {epoch + 1} of {epochs}: loss {metrics['loss/value_avg']:.4f}, explained variance {found[-1]:.3f}")
    return found[0], found[-1]


def _shuffled(rows: list[StoredRollout], size: int, seed: int) -> Iterator[list[StoredRollout]]:
    generator = torch.Generator().manual_seed(seed + ORDER_SEED_OFFSET)
    order = torch.randperm(len(rows), generator=generator, device="cpu").tolist()
    for start in range(0, len(order), size):
        yield [rows[i] for i in order[start : start + size]]


def _update(learner: Learner, rows: list[StoredRollout], config: Recipe, seed: int) -> dict[str, float]:
    """As PPO's update of a critic alone, towards other targets."""
    critic: Critic = learner.roles.critic
    rollout, algorithm = as_rollout(rows, critic.trunk.device), PPO(config)
    returns = returns_of(rows, config, rollout.tokens.device)
    # Neither policy nor old values have a say in the loss.
    evaluation = Evaluation(rollout.action_bounds, logprobs=torch.zeros_like(returns), values=torch.zeros_like(returns))
    targets = Targets(rollout.action_bounds, advantages=torch.zeros_like(returns), returns=returns)
    plan = plan_epochs(
        Lengths.of(rollout),
        epochs=1,
        num_minibatches=config.learner.num_minibatches,
        max_tokens=_budget(config),
        seed=seed,
    )

    def losses(roles: nn.Module, minibatch: Minibatch, own: list[Microbatch]):
        return algorithm.losses(roles, rollout, evaluation, targets, minibatch, own, train_policy=False)

    try:
        found = learner.minimise(losses, plan, Lengths.of(rollout), learned=["critic"])
    except NonFiniteUpdates as error:
        raise TrainingError(f"{error}: lower critic.lr, or look at the scores of the rollouts") from error
    return {name: found[name] for name in ("loss/value_avg", "grad_norm/critic", "update/skipped") if name in found}


def returns_of(rows: Sequence[StoredRollout], config: Recipe, device: torch.device) -> Tensor:
    """fp32 [N], in the order of `as_rollout`'s actions: the score, less what is charged for a missing end, discounted from the last action on."""
    counts = torch.tensor([sum(row.action_mask) for row in rows], dtype=torch.int64, device=device)
    bounds = nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    rewards = torch.zeros(int(counts.sum()), dtype=torch.float32, device=device)
    penalty = config.reward.missing_eos_penalty
    scores = [row.score - (penalty if row.cut_off else 0.0) for row in rows]
    rewards[bounds[1:].long() - 1] = torch.tensor(scores, dtype=torch.float32, device=device)
    return rewards_to_go(rewards, bounds, config.advantage.gamma)


@torch.no_grad()
def _explained(critic: Critic, rows: list[StoredRollout], config: Recipe) -> float:
    """Of the returns of the rows' actions."""
    rollout = as_rollout(rows, critic.trunk.device)
    values = torch.zeros(rollout.num_actions, dtype=torch.float32, device=rollout.tokens.device)
    everything, firsts = (
        split_microbatches(range(len(rows)), Lengths.of(rollout), _budget(config)),
        rollout.action_bounds,
    )
    for indices in everything:
        found = critic_outputs(critic, rollout.select(indices)).values.float()
        for index, part in zip(indices, found.split([firsts[i + 1] - firsts[i] for i in indices]), strict=True):
            values[firsts[index] : firsts[index + 1]] = part
    return explained_variance(values, returns_of(rows, config, rollout.tokens.device))


def _budget(config: Recipe) -> int:
    return config.critic.tokens_per_microbatch or config.learner.tokens_per_microbatch
