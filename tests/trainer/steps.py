"""Scoring and training of a tiny model on a device, in several micro-batches a minibatch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.algorithms.ppo import PPO
from fastppo.evaluation import Evaluation
from fastppo.learner import Learner, accumulate_gradients
from fastppo.model import prepare_model
from fastppo.roles import Roles
from fastppo.rollout import Engine, Rollout, SamplingParams
from fastppo.targets import Targets
from tests.rollout.tiny import make_model, ragged_prompts
from tests.tiny import ppo_config

CONFIG = ppo_config(
    reward__kl_coef=0.1,
    advantage__bootstrap_truncated=True,
    learner__num_minibatches=2,
    learner__tokens_per_microbatch=24,
    learner__epochs=1,
)


def moved(rollout: Rollout, device: torch.device) -> Rollout:
    """With the host's numbers as they are once a step has looked at them."""
    rollout = rollout.select(range(rollout.num_sequences))
    there = object.__new__(Rollout)
    vars(there).update({name: x.to(device) if isinstance(x, Tensor) else x for name, x in vars(rollout).items()})
    return there


class Step:
    """A rollout that was sampled on the CPU; networks and plan."""

    def __init__(self, family: str, n: int, critic: str, device: torch.device) -> None:
        model = prepare_model(make_model(family))
        rollout = Engine(model).generate(ragged_prompts(), SamplingParams(n=n, max_new_tokens=6, seed=5))
        self.rollout, self.algorithm = moved(rollout, device), PPO(CONFIG)
        self.roles = Roles(model, critic=critic, with_reference=True).to(device)
        self.roles.reference.to(device)
        sections = {"optimizer": CONFIG.optimizer, "critic": CONFIG.critic, "config": CONFIG.learner}
        self.learner = Learner(self.roles, **sections, total_steps=2)
        self.plan = self.learner.plan(self.rollout, seed=0)
        assert all(len(minibatch) > 1 for minibatch in self.plan[0])
        numbers = torch.zeros(self.rollout.num_actions, device=device)
        self.targets = Targets(self.rollout.action_bounds, advantages=numbers, returns=numbers)

    def evaluate(self) -> Evaluation:
        return self.roles.evaluate(self.rollout, self.algorithm.needs, self.plan)

    def accumulate(self, evaluation: Evaluation) -> None:
        """Every micro-batch forward and backward."""
        for minibatch in self.plan[0]:
            accumulate_gradients(self.algorithm.losses(self.roles, self.rollout, evaluation, self.targets, minibatch))

    def update(self, evaluation: Evaluation) -> None:
        self.algorithm.update(self.learner, self.rollout, evaluation, self.targets, self.plan)
