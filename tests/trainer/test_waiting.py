"""What the host waits for of a GPU between a rollout and the weights after it: never for a micro-batch."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from fastppo.algorithms.ppo import PPO
from fastppo.evaluation import Evaluation
from fastppo.learner import Learner
from fastppo.model import prepare_model
from fastppo.plan import Plan
from fastppo.roles import Roles
from fastppo.rollout import Engine, SamplingParams
from fastppo.targets import Targets
from tests.rollout.tiny import make_model, ragged_prompts
from tests.stand_in_gpu import DEVICE, on_the_gpu, stand_in_gpu
from tests.tiny import ppo_config

# Once a minibatch: its metrics and gradient norms, which decide whether it is applied.
A_MINIBATCH = Counter({"learner._numbers: _to_copy": 1})

CONFIG = ppo_config(
    reward__kl_coef=0.1,
    advantage__bootstrap_truncated=True,
    learner__num_minibatches=2,
    learner__tokens_per_microbatch=24,
    learner__epochs=1,
)


class Step:
    def __init__(self, family: str, n: int, critic: str) -> None:
        model = prepare_model(make_model(family))
        rollout = Engine(model).generate(ragged_prompts(), SamplingParams(n=n, max_new_tokens=6, seed=5))
        self.rollout, self.algorithm = on_the_gpu(rollout), PPO(CONFIG)
        self.roles = Roles(model, critic=critic, with_reference=True).to(DEVICE)
        self.roles.reference.to(DEVICE)
        sections = {"optimizer": CONFIG.optimizer, "critic": CONFIG.critic, "config": CONFIG.learner}
        self.learner = Learner(self.roles, **sections, total_steps=2)
        for optimizer in self.learner.optimizers.values():
            for group in optimizer.adamw.param_groups:
                group["fused"] = False  # the fused one knows real devices only

    def plan(self) -> Plan:
        plan = self.learner.plan(self.rollout, seed=0)
        assert all(len(minibatch) > 1 for minibatch in plan[0])
        return plan

    def update(self, plan: Plan, evaluation: Evaluation) -> None:
        numbers = torch.zeros(self.rollout.num_actions, device=DEVICE)
        targets = Targets(self.rollout.action_bounds, advantages=numbers, returns=numbers)
        self.algorithm.update(self.learner, self.rollout, evaluation, targets, plan)


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2"])
def test_no_micro_batch_waits(family, n, critic):
    """Prompts of one sample, and shared ones; attention that a kernel knows, with a window, and written out."""
    step = Step(family, n, critic)
    plan = step.plan()
    with stand_in_gpu() as gpu:
        evaluation = step.roles.evaluate(step.rollout, step.algorithm.needs, plan)
        assert gpu.waits == []
        step.update(plan, evaluation)
    minibatches = sum(map(len, plan))
    assert Counter(gpu.waits) == Counter({name: count * minibatches for name, count in A_MINIBATCH.items()})


def test_the_stand_in_sees_what_waits():
    host = torch.tensor([1, 2, 3])
    with stand_in_gpu() as gpu:
        x = torch.arange(3, device=DEVICE)
        host.pin_memory().to(DEVICE, non_blocking=True)
        x[1:] + host.max().item()
        x.repeat_interleave(x, output_size=9)
        assert gpu.waits == []
        waiting = [
            lambda: x.tolist(),
            lambda: bool(x.sum()),
            lambda: x[[0, 1]],
            lambda: torch.tensor([1.0], device=DEVICE),
            lambda: x.new_tensor([1]),
            lambda: host.to(DEVICE),
            lambda: host.to(DEVICE, non_blocking=True),
            lambda: x.copy_(host),
        ]
        for number, call in enumerate(waiting, start=1):
            call()
            assert len(gpu.waits) == number
        for call in (lambda: x[x > 1], x.nonzero, lambda: x.repeat_interleave(x)):  # no shapes without numbers
            before = len(gpu.waits)
            with pytest.raises((NotImplementedError, RuntimeError)):
                call()
            assert len(gpu.waits) == before + 1
