"""Turns losses into new weights: accumulated gradients, one vote on whether they are finite, optimizer steps. The one place with optimizers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from fastppo.config import CriticConfig, LearnerConfig, OptimizerConfig
from fastppo.distributed import ALONE, LostRank, Ranks
from fastppo.errors import TrainingError
from fastppo.evaluation import Evaluation
from fastppo.model.host import require_gpu
from fastppo.model.sharding import can_start_again
from fastppo.optimizer import LossScale, Optimizer, learning_rate_factor
from fastppo.out_of_memory import Found, TokenBudget, is_out_of_memory
from fastppo.plan import Lengths, Microbatch, Minibatch, Plan, plan_epochs, split_again, split_groups_warning
from fastppo.roles import Roles
from fastppo.rollout.rollout import Rollout
from fastppo.stored_shards import read_into

Losses = Iterator[tuple[Tensor, Mapping[str, Tensor]]]
"""(loss, metrics) of some micro-batches of a minibatch, which add up."""
MakeLosses = Callable[[Roles, Minibatch, list[Microbatch]], Losses]
"""(roles, a minibatch, those of its micro-batches that are run here) -> their losses, as parts of the whole minibatch's"""


class NonFiniteUpdates(RuntimeError):
    """Too many updates in a row were not finite."""


class Learner:
    """Minimises losses of policy and critic over the minibatches of a plan.

    Args:
        roles: whose weights learn.
        optimizer, critic: rates and AdamW's settings, and where the critic's differ. config: how a rollout is cut up.
        total_steps: where the schedule of the learning rates ends.
        note: hears what the user should know.
        ranks: among which the micro-batches are divided. Each has all weights, and makes the same steps with the same sums of gradients.
    """

    def __init__(
        self,
        roles: Roles,
        *,
        optimizer: OptimizerConfig,
        critic: CriticConfig,
        config: LearnerConfig,
        total_steps: int,
        note: Callable[[str], None] = lambda sentence: None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.roles, self.config, self.total_steps, self.ranks = roles, config, total_steps, ranks
        self.budget = TokenBudget(config.tokens_per_microbatch, note, ranks)
        if optimizer.bf16_stochastic_round:
            _require_bfloat16(roles)
        if optimizer.offload:
            require_gpu("optimizer.offload", next(roles.parameters()).device)
        self._critic, self._schedules = critic, {"policy": optimizer, "critic": critic_optimizer(critic, optimizer)}
        self.optimizers = {
            name: Optimizer(module.named_parameters(), self._schedules[name].lr, self._schedules[name])
            for name, module in roles.trained().items()
        }
        self.loss_scale = LossScale.for_types(roles.dtypes)
        for trained in self.optimizers.values():
            trained.loss_scale = self.loss_scale
        self.is_sharded = any(trained.is_sharded for trained in self.optimizers.values())
        """Whether each rank has a part of the weights alone."""
        self.step = 0
        self.skipped_in_a_row = 0

    def plan(self, rollout: Rollout, seed: int, note: Callable[[str], None] = lambda sentence: None) -> Plan:
        """Minibatches and micro-batches of a rollout; `note` hears where the budget keeps a prompt's samples apart."""
        lengths = Lengths.of(rollout)
        if warning := split_groups_warning(lengths, self.budget.tokens):
            note(warning)
        return plan_epochs(
            lengths,
            epochs=self.config.epochs,
            num_minibatches=self.config.num_minibatches,
            max_tokens=self.budget.tokens,
            seed=seed,
            ranks=self.ranks.size,
        )

    def within_memory(self, attempt: Callable[[Plan], Found], plan: Plan, lengths: Lengths) -> tuple[Found, Plan]:
        """What `attempt` makes of a plan, and that plan: with smaller micro-batches where memory ran out, in which case it is repeated from its
        beginning, without gradients. Raises TrainingError where that is of no use, or an older torch cannot repeat it with sharded weights."""

        def start_again() -> None:
            self._clear_gradients()
            self.roles.start_again()

        with self._naming_lost_ranks():
            if self.is_sharded and not can_start_again():
                return self.budget.once(attempt, plan), plan
            return self.budget.fit(attempt, plan, lengths, start_again)

    @contextmanager
    def _naming_lost_ranks(self) -> Iterator[None]:
        """Where a layer cannot be gathered because a rank is gone, torch's error becomes one that says which."""
        try:
            yield
        except RuntimeError as error:
            if self.ranks.lost is None:
                raise
            raise LostRank(self.ranks.lost) from error

    def evaluate(
        self,
        rollout: Rollout,
        want: Collection[str],
        plan: Plan,
        recompute_logprobs: Literal["auto", "always", "never"] = "auto",
    ) -> tuple[Evaluation, Plan]:
        """`Roles.evaluate`, and the plan whose micro-batches had room for it."""

        def attempt(plan: Plan) -> Evaluation:
            return self.roles.evaluate(rollout, want, plan, recompute_logprobs, self.ranks)

        return self.within_memory(attempt, plan, Lengths.of(rollout))

    def critic_plan(self, rollout: Rollout, seed: int) -> Plan | None:
        """The critic's own plan, with minibatches as `plan` has them in the epochs that both have; None where it learns by that one."""
        if self._critic.epochs is None and self._critic.tokens_per_microbatch is None:
            return None
        return plan_epochs(
            Lengths.of(rollout),
            epochs=self._critic.epochs or self.config.epochs,
            num_minibatches=self.config.num_minibatches,
            max_tokens=self._critic.tokens_per_microbatch or self.budget.tokens,
            seed=seed,
            ranks=self.ranks.size,
        )

    def start_step(self, step: int) -> dict[str, float]:
        """Set the learning rates of `step` (0-based) and return them."""
        self.step = step
        names, rates = {"policy": "lr", "critic": "critic_lr"}, {}
        for name, optimizer in self.optimizers.items():
            factor = learning_rate_factor(self._schedules[name], step, self.total_steps)
            rates[names[name]] = optimizer.set_learning_rate(factor)
        return rates

    # Gradients are on, whatever the caller or a reward function has set for its thread.
    @torch.inference_mode(mode=False)
    def minimise(
        self,
        losses: MakeLosses,
        plan: Plan,
        lengths: Lengths,
        *,
        learned: Collection[str],
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, float]:
        """One optimizer step for each minibatch of the plan, for the `learned` of "policy" and "critic"; returns metrics.

        lengths: of the plan's sequences. A minibatch for which memory runs out is repeated, and it and those after it are cut smaller.
        A minibatch whose gradient norm is not finite updates nothing; `update/skipped` counts them. The averages are over the applied
        ones. Raises NonFiniteUpdates after `max_skipped_updates` of them in a row, also over the borders of steps.
        """
        applied: list[dict[str, float]] = []
        minibatches, planned_for = [minibatch for epoch in plan for minibatch in epoch], self.budget.tokens

        def gradients(plan: Plan) -> tuple[dict[str, float], dict[str, Tensor], bool]:
            return self._gradients(losses, plan[0][0])

        for done, minibatch in enumerate(minibatches, start=1):
            single = [[minibatch]]
            if self.budget.tokens != planned_for:
                single = split_again(single, lengths, self.budget.tokens, self.ranks.size)
            (metrics, norms, finite), _ = self.within_memory(gradients, single, lengths)
            if finite:
                for name in learned:
                    self._step(self.optimizers[name], norms[name])
                applied.append(metrics)
                self.skipped_in_a_row = 0
            else:
                self.skipped_in_a_row += 1
            self._clear_gradients()
            if self.skipped_in_a_row >= self.config.max_skipped_updates:
                raise NonFiniteUpdates(f"{self.skipped_in_a_row} updates in a row were not finite")
            if progress:
                progress(done, len(minibatches))
        return _means(applied) | {"update/skipped": float(len(minibatches) - len(applied))}

    @staticmethod
    def _step(optimizer: Optimizer, norm: Tensor) -> None:
        """Raises TrainingError where memory runs out: weights may be half-way then, and nothing smaller can be tried."""
        try:
            optimizer.step(norm)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise TrainingError(
                    f"memory ran out in the optimizer's step ({' '.join(str(error).split())}): optimizer.name=adamw_8bit, lora.r or a smaller critic "
                    "need less. The step in hand is lost"
                ) from error
            raise

    def _gradients(self, losses: MakeLosses, minibatch: Minibatch) -> tuple[dict[str, float], dict[str, Tensor], bool]:
        """The minibatch's metrics, its gradient norms, and whether these are finite. Where fp16 gradients have overflowed, again at a
        smaller scale. All numbers come to the host at once: it waits for the device once a minibatch."""
        while True:
            totals = self._summed(accumulate_gradients(self._own_losses(losses, minibatch), self.loss_scale.value))
            for optimizer in self.optimizers.values():
                optimizer.take_gradients()
            norms = {name: optimizer.gradient_norm() for name, optimizer in self.optimizers.items()}
            metrics = _numbers(totals | {f"grad_norm/{name}": norm for name, norm in norms.items()})
            finite = all(math.isfinite(metrics[f"grad_norm/{name}"]) for name in norms)
            if self.loss_scale.keep(finite):
                return metrics, norms, finite
            self._clear_gradients()

    def _own_losses(self, losses: MakeLosses, minibatch: Minibatch) -> Losses:
        """Of this rank's micro-batches. With sharded weights every rank has to run as many: some sequence stands in for an empty one, whose loss
        and metrics are 0."""
        own = self.ranks.own(minibatch)
        if not self.is_sharded:
            yield from losses(self.roles, minibatch, [batch for batch in own if batch])
            return
        stand_in = next(batch for batch in minibatch if batch)[:1]
        made = losses(self.roles, minibatch, [batch or stand_in for batch in own])
        for batch, (loss, metrics) in zip(own, made, strict=True):
            yield (loss, metrics) if batch else (loss * 0, {name: torch.zeros_like(x) for name, x in metrics.items()})

    def _summed(self, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """The metrics of all ranks' micro-batches together; the gradients become theirs too, where any rank has one. FSDP has summed its own."""
        if self.ranks.size == 1:
            return totals
        whole = [optimizer for optimizer in self.optimizers.values() if not optimizer.is_sharded]
        masters = [graded for optimizer in whole for graded in optimizer.graded.values()]
        found = self.ranks.exchange("what is learned", (list(totals), [master.grad is not None for master in masters]))
        names = next((names for names, _ in found if names), [])
        for master, learned in zip(masters, zip(*(present for _, present in found), strict=True), strict=True):
            if any(learned) and master.grad is None:
                master.grad = torch.zeros_like(master, dtype=torch.float32)
        device = next(iter(totals.values())).device if totals else masters[0].device
        metrics = torch.zeros(len(names), dtype=torch.float64, device=device)
        if totals:
            metrics += torch.stack(list(totals.values()))
        self.ranks.sum_("metrics", [metrics])
        self.ranks.sum_("gradients", [master.grad for master in masters if master.grad is not None])
        return dict(zip(names, metrics.unbind(), strict=True))

    def _clear_gradients(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.clear_gradients()

    def state_dict(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """(file name -> named tensors, what JSON can hold): weights, optimizers and counts."""
        tensors: dict[str, dict[str, Tensor]] = {}
        state: dict[str, Any] = {"skipped_in_a_row": self.skipped_in_a_row, "loss_scale": self.loss_scale.state_dict()}
        state["token_budget"] = self.budget.state_dict()
        for name, module in self.roles.trained().items():
            tensors[name] = module.state_dict()
            tensors[f"{name}_optimizer"], state[f"{name}_optimizer"] = self.optimizers[name].state_dict()
            if masters := self.optimizers[name].separate_masters():
                tensors[f"{name}_masters"] = masters
        return tensors, state

    def load_state_dict(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, bit for bit, also where the weights are sharded otherwise than they were. Raises CheckpointError
        or RuntimeError where it is of other networks."""
        for name, module in self.roles.trained().items():
            optimizer, saved, masters = self.optimizers[name], f"{name}_optimizer", tensors.get(f"{name}_masters")
            if optimizer.is_sharded:
                weights = tensors if masters is None else {name: {**tensors[name], **masters}}
                read_into(module.state_dict(), weights, name)
                moments = optimizer.empty_state(state[saved])
                read_into(moments, tensors, saved)
            else:
                module.load_state_dict(tensors[name])
                # A run whose weights were sharded has kept them in fp32, and has no other masters.
                optimizer.restore_masters(tensors[name] if masters is None else masters)
                moments = tensors[saved]
            optimizer.load_state_dict(moments, state[saved])
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.loss_scale.load_state_dict(state["loss_scale"])
        self.budget.load_state_dict(state.get("token_budget", self.budget.state_dict()))


def _require_bfloat16(roles: Roles) -> None:
    dtypes = {str(p.dtype).removeprefix("torch.") for p in roles.parameters() if p.requires_grad}
    if "bfloat16" not in dtypes:
        raise ValueError(
            f"optimizer.bf16_stochastic_round is true, expected false where the weights that learn are {' and '.join(sorted(dtypes))}, none bfloat16"
        )


def critic_optimizer(critic: CriticConfig, optimizer: OptimizerConfig) -> OptimizerConfig:
    """The policy's, with what is set for the critic in its place."""
    own = {
        "lr": critic.lr,
        "warmup_steps": critic.lr_warmup_steps,
        "weight_decay": critic.weight_decay,
        "max_grad_norm": critic.max_grad_norm,
    }
    return replace(optimizer, **{name: value for name, value in own.items() if value is not None})


def accumulate_gradients(losses: Losses, scale: float = 1.0) -> dict[str, Tensor]:
    """Add the gradients of all micro-batches, times `scale`, to the parameters, and return the sums of their metrics, 0-d each."""
    totals: Tensor | None = None
    names: list[str] = []
    for loss, metrics in losses:
        (loss if scale == 1 else loss * scale).backward()
        names, found = list(metrics), torch.stack(list(metrics.values()))
        totals = found if totals is None else totals + found
    return {} if totals is None else dict(zip(names, totals.unbind(), strict=True))


def _numbers(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """0-d tensors of one device, read together."""
    return dict(zip(metrics, torch.stack([x.double() for x in metrics.values()]).tolist(), strict=True))


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for metrics in rows:
        for name, value in metrics.items():
            sums[name] += value / len(rows)
    return dict(sums)
