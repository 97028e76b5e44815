"""Estimators of the KL divergence from log-probabilities of sampled tokens, and rewards shaped by them; plain
PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
MAX_K3 = 10.0


def clamp(x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """torch.clamp by selection. The gradient flows at the bounds and stops beyond; a NaN stays, in its gradient too."""
    return torch.where(x > high, high, torch.where(x < low, low, x))


class _WithGradientOf(torch.autograd.Function):
    @staticmethod
    def forward(value: Tensor, other: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def with_gradient_of(value: Tensor, other: Tensor) -> Tensor:
    """`value` with the gradient of `other`, both of one shape; value + (other - other.detach()) is NaN where it is infinite."""
    return _WithGradientOf.apply(value.detach(), other)


def approx_kl(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """Estimates of KL(policy || reference) at tokens sampled from the policy (Schulman 2020, "Approximating KL
    Divergence", http://joschu.net/blog/kl-approx.html), with d = logprobs - ref_logprobs:

        k1 = d,   k2 = d^2 / 2,   k3 = exp(-d) - 1 + d,   abs = |d|

    In k3, -d is clamped to [-20, 20] and the value to at most 10, gradients included (verl's low_var_kl). "k1+" and
    "k3+" have that value and the gradient of k2. logprobs, ref_logprobs [...] -> fp32 [...] (fp64 if any input is).
    """
    dtype = torch.float64 if torch.float64 in (logprobs.dtype, ref_logprobs.dtype) else torch.float32
    d = logprobs.to(dtype) - ref_logprobs.to(dtype)
    if kind.endswith("+"):
        return with_gradient_of(approx_kl(logprobs, ref_logprobs, kind[:-1]), 0.5 * d.square())
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d.square()
    if kind == "abs":
        return d.abs()
    u = clamp(-d, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return clamp(torch.expm1(u) - u, -torch.inf, MAX_K3)


def kl_shaped_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    coef: float,
    kind: str = "k1",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """r_t = -coef * kl_t where mask is set, 0 elsewhere, plus the sequence's score at its last set position.

    scores [B]; logprobs, ref_logprobs, mask [B, T], or packed [total] with cu_seqlens [B + 1] -> fp32 rewards of that
    shape (fp64 if any input is). A sequence with an empty mask gets nothing; with coef = 0 the log-probabilities are not
    looked at.
    """
    dtype = torch.float64 if torch.float64 in (x.dtype for x in (scores, logprobs, ref_logprobs)) else torch.float32
    rewards = torch.zeros(logprobs.shape, dtype=dtype, device=logprobs.device)
    if coef != 0:
        policy, other = (torch.where(mask, x, 0).to(dtype) for x in (logprobs, ref_logprobs))
        rewards = torch.where(mask, -coef * approx_kl(policy, other, kind), rewards)
    flat_mask = mask.reshape(-1)
    if cu_seqlens is None:
        sequence = torch.arange(flat_mask.numel(), dtype=torch.int64, device=mask.device) // max(mask.shape[-1], 1)
    else:
        lengths = cu_seqlens.long().diff()
        sequence = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int64, device=mask.device), lengths)
    # The set position of a sequence that no other set position of it follows.
    position = torch.where(flat_mask, torch.arange(flat_mask.numel(), dtype=torch.int64, device=mask.device), -1)
    last = torch.full((len(scores),), -1, dtype=torch.int64, device=mask.device).scatter_reduce(
        0, sequence, position, "amax"
    )
    is_last = flat_mask & (position == last[sequence])
    score = scores.to(dtype)[sequence].view(rewards.shape)
    return torch.where(is_last.view(rewards.shape), rewards + score, rewards)
