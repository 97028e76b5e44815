"""Case of a PPO step's update alone: what it takes, and the peak of its activations and gradients.

All get the same completions, old log-probs, values, advantages and returns, and make the same optimizer steps. A call begins where a trainer
rests between updates: networks, reference and AdamW's moments exist, gradients do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from fastppo.bench import floors
from fastppo.bench.harness import Case, Tensors
from fastppo.bench.peers import EAGER, OURS
from fastppo.bench.ppo_step import (
    CONFIG,
    LONG_ROUNDS,
    PER_TOKEN,
    QUICK,
    USUAL,
    FusedStep,
    PlainStep,
    Shape,
    floor_sizes,
    loss_error,
    losses_of,
    make_prompts,
)
from fastppo.bench.rollout_workload import VOCABULARY, make_model, prompts_of
from fastppo.bench.setting import Setting
from fastppo.evaluation import Evaluation
from fastppo.rollout import FinishReason, Rollout
from fastppo.rollout.record import bounds_of
from fastppo.targets import Targets

PARTED = "eager, a prompt at a time"
# A micro-batch holds one prompt's samples.
SPARING = replace(CONFIG, learner=replace(CONFIG.learner, tokens_per_microbatch=1024))
REST_PROMPT = 8  # tokens of the prompt in the update that brings a step to rest


class FusedUpdate:
    """`FusedStep`'s."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.step = shape, FusedStep(shape, config=SPARING)

    def __call__(self, x: Tensors, chosen: list[list[int]] | None = None) -> Tensors:
        rollout = packed(x, self.shape.samples)
        given = {name: x[name].flatten() for name in PER_TOKEN}
        evaluation = Evaluation(rollout.action_bounds, logprobs=given["old_logprobs"], values=given["values"])
        targets = Targets(rollout.action_bounds, advantages=given["advantages"], returns=given["returns"])
        plan = self.step.learner.plan(rollout, seed=0) if chosen is None else [[[minibatch] for minibatch in chosen]]
        return losses_of(self.step.algorithm.update(self.step.learner, rollout, evaluation, targets, plan))


class PlainUpdate:
    """`PlainStep`'s; `at_a_time` as there."""

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.float32, at_a_time: int | None = None) -> None:
        self.step = PlainStep(shape, dtype, at_a_time)

    def __call__(self, x: Tensors, chosen: list[list[int]] | None = None) -> Tensors:
        batch = self.step.sequences(x, x["completions"]) | {name: x[name] for name in PER_TOKEN}
        return {"losses": self.step.update(batch, chosen)}


Update = Callable[..., Tensors]


class Resting:
    """An update whose networks are made, and whose optimizers have their moments, before the first call."""

    def __init__(self, make: Callable[[], Update]) -> None:
        self.make, self.update = make, None

    def prepare(self, x: Tensors) -> Tensors:
        """One optimizer step on the first sequence, its prompt cut short, so that it leaves little behind."""
        if self.update is None:
            self.update = self.make()
            self.update(x | {"lengths": x["lengths"].clamp_max(REST_PROMPT)}, [[0]])
        return {}

    def __call__(self, x: Tensors) -> Tensors:
        self.prepare(x)
        return self.update(x)


def packed(x: Tensors, samples: int) -> Rollout:
    """The given completions [B, N], each after its prompt."""
    prompts, new = prompts_of(x), x["completions"].shape[1]
    rows = [torch.tensor(prompts[i // samples] + row) for i, row in enumerate(x["completions"].tolist())]
    logprobs = x["old_logprobs"].flatten()
    return Rollout(
        tokens=torch.cat(rows),
        cu_seqlens=torch.tensor(bounds_of(map(len, rows)), dtype=torch.int32),
        position_ids=torch.cat([torch.arange(len(row)) for row in rows]),
        action_mask=torch.cat([torch.arange(len(row)) >= len(row) - new for row in rows]),
        logprobs=logprobs,
        processed_logprobs=logprobs,
        finish_reasons=torch.full((len(rows),), FinishReason.LENGTH, dtype=torch.int8),
        prompt_index=torch.arange(len(rows)) // samples,
        temperature=1.0,
    )


def inputs(shape: Shape, generator: torch.Generator) -> Tensors:
    """Random, of the size that they have in a step: log-probs near those of a uniform draw, advantages as whitened."""
    size = shape.sequences, shape.new_tokens
    noise = {name: torch.randn(size, generator=generator) for name in PER_TOKEN}
    return make_prompts(shape, generator) | {
        "completions": torch.randint(VOCABULARY, size, generator=generator),
        "old_logprobs": 0.1 * noise["old_logprobs"] - torch.tensor(VOCABULARY).log(),
        "values": 0.1 * noise["values"],
        "advantages": noise["advantages"],
        "returns": 0.5 + 0.1 * noise["returns"],
    }


def compare(x: Tensors, outputs: Tensors, exact: Tensors) -> float:
    return loss_error(outputs["losses"], exact["losses"])


def make_case(shape: Shape) -> Case:
    updates = {
        OURS: Resting(lambda: FusedUpdate(shape)),
        EAGER: Resting(lambda: PlainUpdate(shape)),
        PARTED: Resting(lambda: PlainUpdate(shape, at_a_time=shape.samples)),
    }
    minibatches = CONFIG.learner.num_minibatches
    return Case(
        op="ppo_update",
        name=shape.name.removesuffix(", a step"),
        inputs=lambda generator: inputs(shape, generator),
        providers=updates,
        prepare={name: update.prepare for name, update in updates.items()},
        exact=lambda x: Resting(lambda: PlainUpdate(shape, torch.float64))(x),
        compare=compare,
        work=floors.ppo_update(make_model(shape.hidden, shape.layers), *floor_sizes(shape), minibatches),
        rounds=LONG_ROUNDS,
        peaks=True,
    )


def cases(setting: Setting) -> list[Case]:
    return [make_case((QUICK if setting.quick else USUAL)[1])]
