"""Trust region policy optimisation (Schulman et al. 2015, arXiv:1502.05477), over the actions of packed rollouts.

One policy step a rollout, within a trust region (`trust_region.py`). The critic learns as PPO's does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastppo.algorithms.ppo import PPO
from fastppo.algorithms.trust_region import Comparison, flat, line_search, longest_step
from fastppo.config import PPOConfig
from fastppo.distributed import ALONE, Ranks
from fastppo.evaluation import Evaluation
from fastppo.learner import Learner, NonFiniteUpdates
from fastppo.model import LMHead, lm_head
from fastppo.model.divided import local_part
from fastppo.model.sharding import gathered
from fastppo.plan import Lengths, Microbatch, Plan, first_epoch
from fastppo.roles import Roles
from fastppo.rollout.record import on_device, places_in
from fastppo.rollout.rollout import Rollout
from fastppo.targets import Targets

DIFFERENCE_TRIES = 4
CHUNK = 2**22  # logits at a time, when whole distributions are compared


class TRPO(PPO):
    """PPO's advantages and critic, and a policy that moves once a rollout by at most `trpo.max_kl`."""

    def __init__(self, config: PPOConfig) -> None:
        super().__init__(config)
        self.skipped_in_a_row = 0

    def update(
        self,
        learner: Learner,
        rollout: Rollout,
        evaluation: Evaluation,
        targets: Targets,
        plan: Plan,
        progress: Callable[[int, int], None] | None = None,
        critic_plan: Plan | None = None,
    ) -> dict[str, float]:
        """The policy's step, then the critic's over the minibatches of its plan; in the critic's warm-up that alone."""
        metrics: dict[str, float] = {}
        if train_policy := self._policy_learns(learner.step, evaluation, targets):
            parameters = list(learner.optimizers["policy"].parameters.values())

            def attempt(plan: Plan) -> dict[str, float]:
                step = PolicyStep(learner.roles, parameters, rollout, first_epoch(plan), learner.ranks)
                try:
                    return self._policy_step(step, targets)
                except BaseException:
                    step.restore()
                    raise

            metrics, plan = learner.within_memory(attempt, plan, Lengths.of(rollout))
            if self.skipped_in_a_row >= learner.config.max_skipped_updates:
                raise NonFiniteUpdates(f"{self.skipped_in_a_row} updates in a row were not finite")
        if self.has_critic:
            records = rollout, evaluation, targets
            metrics |= self._train_critic(learner, *records, critic_plan or plan, progress, metrics)
        return metrics | self._move_coefficients(rollout, evaluation, metrics, train_policy)

    def _policy_step(self, step: PolicyStep, targets: Targets) -> dict[str, float]:
        """Move the policy, or leave it as it is where nothing on the line keeps the limit and gains."""
        config = self.config.trpo
        gradient = step.gradient(targets.advantages)
        norm = step.norm(gradient).item()
        if not math.isfinite(norm):
            self.skipped_in_a_row += 1
            return {"update/skipped": 1.0}
        self.skipped_in_a_row = 0
        old, before = step.distributions(), targets.advantages.mean().item()

        def move_and_compare(along: Tensor) -> Comparison:
            step.move_to(along)
            return step.compare(old, targets.advantages)

        longest = longest_step(step.fisher_vector, gradient, config, step.dot)
        share, found = line_search(move_and_compare, longest, before, config, step.dot)
        return {
            "loss/policy_avg": -found.surrogate,
            "policy/kl": found.kl,
            "policy/entropy_avg": found.old_entropy,
            "policy/step_share": share,
            "policy/surrogate_gain": found.surrogate - before,
            "grad_norm/policy": norm,
            "update/skipped": 0.0,
        }

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"trpo": {"skipped_in_a_row": self.skipped_in_a_row}}

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        super().load_state_dict(state)
        self.skipped_in_a_row = int(state.get("trpo", {"skipped_in_a_row": 0})["skipped_in_a_row"])


class Distributions(NamedTuple):
    """Of the next token before each of n actions, this rank's."""

    states: Tensor  # [n, H]
    head: LMHead


class PolicyStep:
    """A policy at its weights θ and around them, on one rollout.

    `parameters` are moved in place, alike on all ranks; `micro_batches` are the sequences that run together, of which each rank has its share.
    Vectors over the P numbers of the parameters, [P], have this rank's parts alone where the weights are sharded.
    """

    def __init__(
        self,
        roles: Roles,
        parameters: list[nn.Parameter],
        rollout: Rollout,
        micro_batches: list[Microbatch],
        ranks: Ranks = ALONE,
    ) -> None:
        self.roles, self.parameters, self.rollout, self.ranks = roles, parameters, rollout, ranks
        device = rollout.tokens.device
        self.batches: list[tuple[Rollout, Tensor | None]] = [
            (rollout.select(indices), on_device(places_in(rollout.action_bounds, indices), device))
            if indices
            else (rollout.select([0]), None)  # whose part of a layer other ranks wait for, and nothing else
            for indices in ranks.own(micro_batches)
            if indices or roles.is_sharded
        ]
        places = [places for _, places in self.batches if places is not None]
        self.own, self._order = torch.cat([on_device([], device), *places]).sort()
        """int64 [n]: the places of this rank's actions, and where these stand in its batches."""
        self.theta = flat([local_part(parameter.detach()) for parameter in parameters])
        self.reach = torch.finfo(self.theta.dtype).eps ** (1 / 3)
        """How far the weights were moved for the last difference."""

    def restore(self) -> None:
        """The weights become θ."""
        self._set(self.theta)

    def move_to(self, step: Tensor) -> None:
        """The weights become θ + step."""
        self._set(self.theta + step)

    @torch.no_grad()
    def _set(self, weights: Tensor) -> None:
        own = [local_part(parameter) for parameter in self.parameters]
        parts = weights.split([parameter.numel() for parameter in own])
        for parameter, part in zip(own, parts, strict=True):
            parameter.copy_(part.view_as(parameter))

    def gradient(self, weights: Tensor) -> Tensor:
        """[P]: the gradient of the mean of weights [N] times log-probs: J^T weights / N, where J [N, P] is that of the log-probs."""
        for batch, places in self.batches:
            logprobs = self.roles(batch, values=False, entropy=False).logprobs
            total = logprobs.sum() * 0 if places is None else logprobs @ weights[places].to(logprobs.dtype)
            (total / self.rollout.num_actions).backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        gradient = flat([local_part(x) for x in gradients])
        for parameter in self.parameters:
            parameter.grad = None
        if not self.roles.is_sharded:  # else FSDP has summed them
            self.ranks.sum_("gradient of the policy", [gradient])
        return gradient

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """0-d: the scalar product of two vectors [P]."""
        if not self.roles.is_sharded:
            return a.dot(b)
        product = a.dot(b).to(self.rollout.tokens.device)  # the parts may rest on the host
        self.ranks.sum_("scalar product", [product])
        return product.to(a.device)

    def norm(self, v: Tensor) -> Tensor:
        """0-d: of a vector [P]."""
        return self.dot(v, v).sqrt() if self.roles.is_sharded else v.norm()

    def fisher_vector(self, v: Tensor) -> Tensor:
        """[P]: F v of the Fisher matrix F = J^T J / N of the sampled actions, an unbiased estimate of the Hessian of the mean KL at θ.

        J v is the central difference of the log-probs along v; J^T is the log-probs' own backward pass. Nothing is differentiated twice.
        v is 0 where parameters have no gradient.
        """
        along = self._directional_derivative(v)
        self.move_to(torch.zeros_like(v))
        return self.gradient(along)

    def _directional_derivative(self, v: Tensor) -> Tensor:
        """[N]: J v, from log-probs that a step along v changes by about eps^(1/3): rounding and curvature then weigh the same.

        How far that is depends on the direction; the last one's is a good first guess.
        """
        wanted, length = torch.finfo(v.dtype).eps ** (1 / 3), self.norm(v).item()
        for _ in range(DIFFERENCE_TRIES):
            step = self.reach / length
            change = (self._logprobs(step * v) - self._logprobs(-step * v)) / 2
            found = change.square().mean().sqrt().item()
            if not found > 0 or wanted / 4 <= found <= 4 * wanted:
                break
            self.reach *= min(max(wanted / found, 1e-3), 1e3)
        return change / step

    @torch.no_grad()
    def _logprobs(self, step: Tensor) -> Tensor:
        """[N] at θ + step."""
        self.move_to(step)
        found = torch.zeros(self.rollout.num_actions, dtype=step.dtype, device=self.rollout.tokens.device)
        for batch, places in self.batches:
            logprobs = self.roles(batch, values=False, entropy=False).logprobs
            if places is not None:
                found[places] = logprobs
        self.ranks.sum_("log-probs along a direction", [found])
        return found

    @torch.no_grad()
    def distributions(self) -> Distributions:
        """The policy's as it is now, whatever becomes of its weights."""
        head = self._head()
        bias = None if head.bias is None else head.bias.clone()
        return Distributions(self._states(), head._replace(weight=head.weight.clone(), bias=bias))

    def _head(self) -> LMHead:
        return gathered(self.roles.policy, lambda: lm_head(self.roles.policy))

    def _states(self) -> Tensor:
        """[n, H]: of this rank's actions."""
        width = lm_head(self.roles.policy).weight.shape[1]
        none = torch.empty(0, width, dtype=self.theta.dtype, device=self.rollout.tokens.device)
        states = [(self.roles.action_states(batch), places) for batch, places in self.batches]
        return torch.cat([none, *(own for own, places in states if places is not None)])[self._order]

    @torch.no_grad()
    def compare(self, old: Distributions, advantages: Tensor) -> Comparison:
        """The policy as it is now with the old one. A few states at a time: whole distributions are as wide as the vocabulary."""
        new, count = Distributions(self._states(), self._head()), self.rollout.num_actions
        actions, temperature = self.rollout.tokens[self.rollout.actions[self.own]], self.rollout.temperature
        advantages = advantages[self.own]
        sums = torch.zeros(3, dtype=torch.float64, device=actions.device)
        for rows in torch.arange(len(actions), device=actions.device).split(max(1, CHUNK // old.head.weight.shape[0])):
            p, q = ((x.head.logits(x.states[rows]) / temperature).log_softmax(-1) for x in (old, new))
            kl, entropy = (p.exp() * (p - q)).sum(-1), -(p.exp() * p).sum(-1)
            ratio = (q - p).gather(-1, actions[rows, None]).squeeze(-1).exp()
            sums += torch.stack([x.double().sum() for x in (kl, ratio * advantages[rows], entropy)])
        self.ranks.sum_("comparison with the old policy", [sums])
        return Comparison(*(sums / count).tolist())


def require_float32(model: PreTrainedModel) -> None:
    """Raises ValueError where differences of log-probs along a direction would drown in the rounding of the weights."""
    if model.dtype != torch.float32:
        raise ValueError(f"the model's dtype is {model.dtype}, expected torch.float32 with algorithm trpo")
