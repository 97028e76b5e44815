"""The PPO loss and its variants, in plain PyTorch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastppo.reference.approx_kl import MAX_LOG_RATIO, approx_kl, clamp, with_gradient_of


def larger(unclipped: Tensor, clipped: Tensor) -> Tensor:
    """torch.maximum, but a tie sends the whole gradient to `unclipped` instead of half to each."""
    return torch.where(clipped > unclipped, clipped, unclipped)


def policy_terms(
    logprobs: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    objective: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, ratio, whether clipped, whether dual-clipped) of each token.

    clip (Schulman et al. 2017, arXiv:1707.06347, eq. 7): max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) with
    r = exp(log_ratio); with dual clip (Ye et al. 2020, arXiv:1912.09729) at most -A dual_clip where A < 0.
    cispo (MiniMax-M1, arXiv:2506.13585): -A sg[clip(r)] logprob.
    """
    ratio = clamp(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    low, high = 1 - clip_low, 1 + clip_high
    clipped_ratio = clamp(ratio, low, high)
    if objective == "cispo":
        outside = (ratio < low) | (ratio > high)
        return -advantages * clipped_ratio.detach() * logprobs, ratio, outside, torch.zeros_like(outside)
    unclipped, clipped = -advantages * ratio, -advantages * clipped_ratio
    loss = larger(unclipped, clipped)
    if dual_clip is None:
        return loss, ratio, clipped > unclipped, torch.zeros_like(ratio, dtype=torch.bool)
    bound = -advantages * dual_clip
    beyond = (advantages < 0) & (loss > bound)
    return torch.where(beyond, bound, loss), ratio, clipped > unclipped, beyond


def rollout_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, correction: str | None, bounds: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """(importance weight w = exp(old - rollout), applied weight, whether it was changed) of each token.

    truncate (truncated importance sampling, TIS): min(w, upper bound); mask (IcePop): 0 outside the bounds.
    """
    weights = clamp(old_logprobs - rollout_logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    low, high = bounds
    if correction == "truncate":
        return weights, torch.where(weights > high, high, weights), weights > high
    if correction == "mask":
        outside = (weights < low) | (weights > high)
        return weights, torch.where(outside, 0, weights), outside
    return weights, torch.ones_like(weights), torch.zeros_like(weights, dtype=torch.bool)


def value_terms(
    values: Tensor, old_values: Tensor | None, returns: Tensor, value_clip: float | None
) -> tuple[Tensor, Tensor]:
    """(loss, whether clipped) of each token: 0.5 max((v - R)^2, (clip(v, old +- value_clip) - R)^2)."""
    unclipped = (values - returns).square()
    if value_clip is None:
        return 0.5 * unclipped, torch.zeros_like(unclipped, dtype=torch.bool)
    clipped = (clamp(values, old_values - value_clip, old_values + value_clip) - returns).square()
    return 0.5 * larger(unclipped, clipped), clipped > unclipped


class Sequences:
    """Which sequence each token belongs to: a row of [B, T], or a range of packed [total] tokens."""

    def __init__(self, mask: Tensor, cu_seqlens: Tensor | None) -> None:
        if cu_seqlens is None:
            self.count = mask.shape[0]
            self.ids = torch.arange(self.count, dtype=torch.int64, device=mask.device).unsqueeze(1).expand(mask.shape)
        else:
            self.count = cu_seqlens.numel() - 1
            positions = torch.arange(mask.shape[0], dtype=torch.int64, device=mask.device)
            self.ids = torch.bucketize(positions, cu_seqlens[1:].long(), right=True)
        self.mask = mask
        self.tokens = self.sum(torch.ones_like(mask, dtype=torch.float64))

    def sum(self, x: Tensor) -> Tensor:
        """[count]: sums over each sequence's unmasked tokens."""
        kept = torch.where(self.mask, x, 0).flatten()
        return kept.new_zeros(self.count).index_add(0, self.ids.flatten(), kept)

    def mean(self, x: Tensor) -> Tensor:
        """For each token, the mean over its sequence's unmasked tokens."""
        return (self.sum(x) / self.tokens.clamp(min=1).to(x.dtype))[self.ids]


def sequence_log_ratio(logprobs: Tensor, old_logprobs: Tensor, sequences: Sequences) -> Tensor:
    """GSPO-token (arXiv:2507.18071, eq. 13): the sequence's mean log-ratio with the gradient of the token's."""
    return with_gradient_of(sequences.mean(logprobs - old_logprobs), logprobs)


class Aggregation:
    """How the token terms of one batch become a loss and statistics; what stands under the mask never enters either."""

    def __init__(
        self,
        mask: Tensor,
        cu_seqlens: Tensor | None,
        dtype: torch.dtype,
        aggregation: str,
        denominator: Tensor | float | None,
    ) -> None:
        self.mask, self.dtype = mask, dtype
        self.tokens = mask.sum()
        self.weights: Tensor | float = 1.0
        own = self.tokens
        if aggregation == "seq-mean-token-mean" or (aggregation == "seq-mean-token-sum" and denominator is None):
            sequences = Sequences(mask, cu_seqlens)
            own = (sequences.tokens > 0).sum()
            if aggregation == "seq-mean-token-mean":
                self.weights = (1 / sequences.tokens.clamp(min=1)).to(dtype)[sequences.ids]
        # An empty mask gives 0 whatever the denominator, be it 0 or NaN.
        self.denominator = torch.where(self.tokens > 0, own if denominator is None else denominator, 1).to(dtype)

    def select(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, x.to(self.dtype), 0)

    def loss(self, x: Tensor) -> Tensor:
        return self.select(x).mul(self.weights).sum() / self.denominator

    def mean(self, x: Tensor) -> Tensor:
        return (self.select(x).sum() / self.tokens.clamp(min=1)).detach()

    def max(self, x: Tensor) -> Tensor:
        return torch.cat([self.select(x).flatten(), x.new_zeros(1)]).max().detach()


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    value_clip: float | None = None,
    vf_coef: float = 0.5,
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    entropy_coef: float = 0.0,
    ratio_level: str = "token",
    objective: str = "clip",
    rollout_correction: str | None = None,
    rollout_bounds: tuple[float, float] = (0.5, 2.0),
    aggregation: str = "token-mean",
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """policy + vf_coef * value + kl_coef * KL - entropy_coef * entropy, each a weighted token sum / denominator.

    Tensors are [B, T], packed [total] with `cu_seqlens`, or of any one shape where no sequence matters. Computed in
    fp32, or in fp64 when a tensor is. Returns the loss (0-d) and the statistics by name; `fastppo.ops.ppo_loss` says
    what each option and statistic is.
    """
    constants = [old_logprobs, advantages, old_values, returns, ref_logprobs, rollout_logprobs]
    given = [x for x in (logprobs, values, entropy, *constants) if x is not None]
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in given), torch.float32)
    mask = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    batch = Aggregation(mask, cu_seqlens, dtype, aggregation, denominator)
    # Masked places become 0 before anything is computed: what they held reaches neither value nor gradient.
    logprobs, values, entropy = (x if x is None else batch.select(x) for x in (logprobs, values, entropy))
    constants = [x if x is None else batch.select(x.detach()) for x in constants]
    old_logprobs, advantages, old_values, returns, ref_logprobs, rollout_logprobs = constants

    token_log_ratio = logprobs - old_logprobs
    log_ratio = token_log_ratio
    if ratio_level == "sequence":
        log_ratio = sequence_log_ratio(logprobs, old_logprobs, Sequences(mask, cu_seqlens))
    clip = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip, "objective": objective}
    policy, ratio, clipped, dual_clipped = policy_terms(logprobs, log_ratio, advantages, **clip)
    stats = ratio_statistics(batch, token_log_ratio, ratio, clipped, dual_clipped)
    if rollout_logprobs is not None:
        raw, applied, changed = rollout_weights(old_logprobs, rollout_logprobs, rollout_correction, rollout_bounds)
        policy = torch.where(applied == 0, 0, policy * applied)
        stats |= {"rollout_weight_mean": batch.mean(raw), "rollout_clipfrac": batch.mean(changed)}

    terms = {"policy_loss": (1.0, batch.loss(policy))}
    if values is not None:
        value, clipped = value_terms(values, old_values, returns, value_clip)
        terms["value_loss"] = (vf_coef, batch.loss(value))
        stats["value_clipfrac"] = batch.mean(clipped)
    if ref_logprobs is not None:
        terms["kl_loss"] = (kl_coef, batch.loss(approx_kl(logprobs, ref_logprobs, kl_kind)))
        stats["kl_ref"] = batch.mean(approx_kl(logprobs, ref_logprobs, "k3"))
    if entropy is not None:
        terms["entropy_bonus"] = (-entropy_coef, batch.loss(entropy))
        stats["entropy"] = batch.mean(entropy)
    # A term with coefficient 0 is left out, not multiplied by 0: should it be infinite, the others stay.
    loss = sum(coefficient * term for coefficient, term in terms.values() if coefficient != 0)
    losses = {name: term.detach() for name, (_, term) in terms.items() if name != "entropy_bonus"}
    return loss, stats | losses


def ratio_statistics(
    batch: Aggregation, token_log_ratio: Tensor, ratio: Tensor, clipped: Tensor, dual_clipped: Tensor
) -> dict[str, Tensor]:
    change = clamp(token_log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return {
        "approx_kl": batch.mean(0.5 * change.square()),
        "ppo_kl": batch.mean(-change),
        "clipfrac": batch.mean(clipped),
        "clipfrac_dual": batch.mean(dual_clipped),
        "ratio_mean": batch.mean(ratio),
        "ratio_max": batch.max(ratio),
        "tokens": batch.tokens.to(batch.dtype),
    }
