"""From a sampled and scored `Rollout` to training data: values, log-probabilities, KL-shaped rewards, advantages, returns."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.actor_critic import ActorCritic, action_positions
from fastppo.config import PPOConfig
from fastppo.ops import approx_kl, gae, kl_shaped_rewards, masked_whiten
from fastppo.rollout import FinishReason, Rollout


@torch.no_grad()
def evaluate_networks(networks: ActorCritic, rollout: Rollout, microbatches: list[list[int]]) -> Tensor:
    """Fill in `old_logprobs`, `values` and (with a reference) `ref_logprobs`; returns final_values fp32 [B].

    The micro-batches are those of the first epoch: the same sequences side by side give the same bits there, so that the ratio of the
    first minibatch is exactly 1.
    """
    total, sequences = len(rollout.tokens), rollout.num_sequences
    per_token = {name: rollout.logprobs.new_zeros(total) for name in ("old_logprobs", "values", "ref_logprobs")}
    final_values = rollout.logprobs.new_zeros(sequences)
    for indices in microbatches:
        batch = rollout.select(indices)
        places = _packed_places(rollout, indices)[batch.action_mask]
        outputs = networks(batch, entropy=False)
        per_token["old_logprobs"][places] = outputs.logprobs.float()
        per_token["values"][places] = outputs.values.float()
        final_values[indices] = outputs.final_values.float()
        if networks.reference is not None:
            per_token["ref_logprobs"][places] = networks.reference_logprobs(batch).float()
    rollout.old_logprobs, rollout.values = per_token["old_logprobs"], per_token["values"]
    rollout.ref_logprobs = per_token["ref_logprobs"] if networks.reference is not None else None
    return final_values


def _packed_places(rollout: Rollout, indices: list[int]) -> Tensor:
    """int64: where the tokens of `rollout.select(indices)` stand in `rollout`."""
    starts = rollout.cu_seqlens.tolist()
    return torch.cat([torch.arange(starts[i], starts[i + 1], device=rollout.tokens.device) for i in indices])


def penalise_unfinished(rollout: Rollout, penalty: float) -> None:
    """Subtract `penalty` from the score of every completion that was cut off; decided by the finish reason, not by its length."""
    cut_off = rollout.finish_reasons == FinishReason.LENGTH
    rollout.scores = torch.where(cut_off, rollout.scores - penalty, rollout.scores)


def compute_advantages(rollout: Rollout, final_values: Tensor, config: PPOConfig) -> None:
    """Fill in `rewards`, `advantages` (whitened when asked) and `returns`, fp32 [total].

    The end-of-sequence token ends the episode: nothing is bootstrapped after it. A completion that hit the length limit is truncated:
    with `bootstrap_truncated` its last state's value stands for what would have come.
    """
    mask = rollout.action_mask
    rewards = kl_shaped_rewards(
        rollout.scores,
        rollout.old_logprobs,
        rollout.old_logprobs if rollout.ref_logprobs is None else rollout.ref_logprobs,
        mask,
        coef=config.kl_coef,
        kind=config.kl_estimator,
        cu_seqlens=rollout.cu_seqlens,
    )
    if config.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    truncated = rollout.finish_reasons == FinishReason.LENGTH
    bootstrap = torch.where(truncated, final_values, 0) if config.bootstrap_truncated else None
    advantages, returns = gae(
        rewards,
        rollout.values,
        mask,
        gamma=config.gamma,
        lam=config.gae_lambda,
        next_values=bootstrap,
        cu_seqlens=rollout.cu_seqlens,
    )
    rollout.rewards, rollout.returns = rewards, returns
    rollout.advantages = masked_whiten(advantages, mask) if config.whiten_advantages else advantages


def rollout_metrics(rollout: Rollout, config: PPOConfig) -> dict[str, float]:
    """What the rollout says about policy, critic and reward before the update, under the field's usual names."""
    actions = action_positions(rollout)
    old_logprobs, sampled = rollout.old_logprobs[actions], rollout.logprobs[actions]
    difference = (old_logprobs - sampled).abs()
    lengths = rollout.completion_lengths.float()
    sequences = rollout.num_sequences
    metrics = {
        "objective/scores": rollout.scores.mean().item(),
        "objective/scores_std": rollout.scores.std(correction=0).item(),
        "objective/entropy": -old_logprobs.sum().item() / sequences,
        "completions/mean_length": lengths.mean().item(),
        "completions/clipped_ratio": (rollout.finish_reasons == FinishReason.LENGTH).float().mean().item(),
        "rollout/logprob_diff_mean": difference.mean().item(),
        "rollout/logprob_diff_max": difference.max().item(),
        "val/explained_var": explained_variance(rollout.values[actions], rollout.returns[actions]),
    }
    kl_sum = 0.0
    if rollout.ref_logprobs is not None:
        kl = approx_kl(old_logprobs, rollout.ref_logprobs[actions], kind=config.kl_estimator)
        kl_sum = kl.sum().item() / sequences
        metrics["objective/kl"] = kl_sum
    metrics["objective/rlhf_reward"] = metrics["objective/scores"] - config.kl_coef * kl_sum
    return metrics


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns); 0 where the returns do not vary beyond rounding."""
    variance = returns.var(correction=0)
    return (1 - (returns - values).var(correction=0) / variance).item() if variance > 1e-8 else 0.0
