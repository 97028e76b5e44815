"""The PPO update: minibatches, micro-batches with accumulated gradients, clipped losses through the fused ops, optimizer steps."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastppo.actor_critic import ActorCritic, action_positions
from fastppo.config import PPOConfig
from fastppo.ops import ppo_loss
from fastppo.optimizer import Optimizer
from fastppo.rollout import Rollout

# Metric name -> field of the loss op's statistics. Losses add up over micro-batches; everything else is a mean over tokens.
LOSS_METRICS = {"loss/policy_avg": "policy_loss", "loss/value_avg": "value_loss"}
TOKEN_METRICS = {
    "policy/approxkl_avg": "approx_kl",
    "policy/clipfrac_avg": "clipfrac",
    "policy/entropy_avg": "entropy",
    "val/clipfrac_avg": "value_clipfrac",
    "val/ratio": "ratio_mean",
}


def update(
    networks: ActorCritic,
    optimizers: dict[str, Optimizer],
    rollout: Rollout,
    plan: list[list[list[list[int]]]],
    config: PPOConfig,
    *,
    train_policy: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Learn from `rollout`, one optimizer step for each minibatch of `plan` (see `minibatch.plan_epochs`); returns metrics.

    optimizers: "policy" and "critic". `train_policy=False` (critic warm-up) leaves the policy's weights alone.
    A minibatch whose gradient norm is not finite updates nothing; `update/skipped` counts them. The averages are over the applied ones.
    """
    applied: list[dict[str, float]] = []
    minibatches = [minibatch for epoch in plan for minibatch in epoch]
    for done, minibatch in enumerate(minibatches, start=1):
        metrics = accumulate_gradients(networks, rollout, minibatch, config, train_policy=train_policy)
        norms = {name: optimizer.gradient_norm() for name, optimizer in optimizers.items()}
        finite = all(math.isfinite(norm) for norm in norms.values())
        if finite:
            for name, optimizer in optimizers.items():
                if train_policy or name != "policy":
                    optimizer.step(norms[name])
            applied.append(metrics | {f"grad_norm/{name}": norm.item() for name, norm in norms.items()})
        for optimizer in optimizers.values():
            optimizer.clear_gradients()
        if progress:
            progress(done, len(minibatches))
    sums: dict[str, float] = defaultdict(float)
    for metrics in applied:
        for name, value in metrics.items():
            sums[name] += value / len(applied)
    return dict(sums) | {"update/skipped": float(len(minibatches) - len(applied))}


def accumulate_gradients(
    networks: ActorCritic, rollout: Rollout, minibatch: list[list[int]], config: PPOConfig, *, train_policy: bool = True
) -> dict[str, float]:
    """Add the gradients of the minibatch's loss to the parameters, micro-batch by micro-batch, and return its statistics.

    Every micro-batch's loss is divided by the denominator of the whole minibatch: the sum does not depend on the split.
    """
    members = torch.tensor([index for indices in minibatch for index in indices], device=rollout.tokens.device)
    actions_of = rollout.completion_lengths[members]
    tokens = int(actions_of.sum())
    denominator = tokens if config.loss_aggregation == "token-mean" else int((actions_of > 0).sum())
    totals = torch.zeros(len(LOSS_METRICS) + len(TOKEN_METRICS), device=rollout.tokens.device)
    for indices in minibatch:
        batch = rollout.select(indices)
        loss, stats = microbatch_loss(networks, batch, config, denominator=denominator, train_policy=train_policy)
        loss.backward()
        losses = [getattr(stats, field) for field in LOSS_METRICS.values()]
        means = [getattr(stats, field) * (stats.tokens / tokens) for field in TOKEN_METRICS.values()]
        totals += torch.stack(losses + means)
    return dict(zip((*LOSS_METRICS, *TOKEN_METRICS), totals.tolist(), strict=True))


def microbatch_loss(
    networks: ActorCritic, batch: Rollout, config: PPOConfig, *, denominator: float, train_policy: bool = True
) -> tuple[Tensor, object]:
    """(loss, statistics) of one packed micro-batch; only its N action tokens reach the head and the loss."""
    actions = action_positions(batch)
    outputs = networks(batch, policy=train_policy)
    old_logprobs = batch.old_logprobs[actions]
    return ppo_loss(
        outputs.logprobs if train_policy else old_logprobs,
        old_logprobs,
        batch.advantages[actions],
        values=outputs.values,
        old_values=batch.values[actions],
        returns=batch.returns[actions],
        entropy=outputs.entropy,
        cu_seqlens=action_cu_seqlens(batch),
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        value_clip=config.value_clip,
        vf_coef=config.vf_coef,
        entropy_coef=config.entropy_coef if train_policy else 0.0,
        aggregation=config.loss_aggregation,
        denominator=denominator,
    )


def action_cu_seqlens(batch: Rollout) -> Tensor:
    """int32 [B + 1]: the sequence boundaries once only the action tokens are kept."""
    counts_before = F.pad(batch.action_mask.long().cumsum(0), (1, 0))
    return counts_before[batch.cu_seqlens.long()].int()
