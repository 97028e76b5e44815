"""KL estimates from log-probabilities of sampled tokens, and rewards shaped by them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.native import approx_kl as native
from fastppo.ops import _checks
from fastppo.ops._backends import choose
from fastppo.ops._registry import custom_op, register_gradient
from fastppo.reference import approx_kl as reference

KINDS = native.KL_KINDS


def approx_kl(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """Elementwise estimates of KL(policy || reference) at tokens sampled from the policy, differentiable in both
    arguments.

    With d = logprobs - ref_logprobs (Schulman 2020, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html):

        k1   d                    unbiased, may be negative; gradient 1
        k2   d^2 / 2              biased, never negative; its gradient d is in expectation that of the KL itself
        k3   exp(-d) - 1 + d      unbiased, never negative; its gradient is not that of the KL
        abs  |d|                  gradient sign(d), 0 at 0
        k1+, k3+                  value of k1, k3 with the gradient of k2 (straight-through)

    In k3 and k3+, -d is clamped to [-20, 20] and the value to at most 10, as verl does. Where a clamp holds (d < -2.61
    or d > 11) the gradient of k3 is 0: as a loss it lets go of the tokens that are furthest off; k2 and k3+ do not.

    Args:
        logprobs, ref_logprobs: [...] of one shape; float32, bfloat16 or float16 (float64 runs in the reference).
        kind: one of the above.

    Returns:
        float32 [...] in nats (float64 for float64). Second derivatives need float64.

    Raises:
        TypeError, ValueError: wrong type, shape or device, or an unknown kind.
    """
    _check_logprobs(logprobs, ref_logprobs, kind)
    if choose("approx_kl", logprobs, ref_logprobs) == "reference":
        return reference.approx_kl(logprobs, ref_logprobs, kind)
    return _approx_kl(logprobs, ref_logprobs, KINDS.index(kind))


@torch.no_grad()
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
    """Rewards for each token: -coef * kl_t where `mask` is set, plus the sequence's score at its last such token.

    One read of each input; not differentiable. What lies outside the mask (NaN) reaches nothing, and nothing is written
    there but 0: the score never lands on padding or on a token that the policy did not choose.

    Args:
        scores: [B] floating; NaN marks the last token's reward.
        logprobs, ref_logprobs: [B, T], or packed [total] with `cu_seqlens`; float32, bfloat16 or float16 (float64 runs
            in the reference).
        mask: bool in logprobs' shape: the tokens that the policy chose.
        coef: the KL coefficient, >= 0. At 0 the log-probabilities are not looked at.
        kind: estimator, see `approx_kl`; "k1+" and "k3+" are "k1" and "k3" here.
        cu_seqlens: int32 or int64 [B + 1]: sequence i is [cu_seqlens[i], cu_seqlens[i + 1]) of the packed tensors.

    Returns:
        float32 (float64 for float64) in logprobs' shape. A sequence with an empty mask gets zeros.

    Raises:
        TypeError, ValueError: wrong type, shape or device, an unknown kind, a negative coef or, on the CPU, wrong
            offsets.
    """
    _check_logprobs(logprobs, ref_logprobs, kind)
    _check_sequences(scores, logprobs, mask, cu_seqlens)
    coef = _checks.number("coef", coef, at_least=0)
    if choose("approx_kl", logprobs, ref_logprobs, scores) == "reference":
        if cu_seqlens is not None:
            _checks.offsets_in_order("cu_seqlens", cu_seqlens, logprobs.shape[0])
        return reference.kl_shaped_rewards(
            scores, logprobs, ref_logprobs, mask, coef=coef, kind=kind, cu_seqlens=cu_seqlens
        )
    return _kl_shaped_rewards(scores, logprobs, ref_logprobs, mask, cu_seqlens, coef, KINDS.index(kind))


def _check_logprobs(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> None:
    _checks.floating("logprobs", logprobs)
    _checks.floating("ref_logprobs", ref_logprobs)
    _checks.shape("ref_logprobs", ref_logprobs, logprobs.shape, "logprobs' shape")
    _checks.same_device("ref_logprobs", ref_logprobs, "logprobs", logprobs)
    _checks.choice("kind", kind, KINDS)


def _check_sequences(scores: Tensor, logprobs: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> None:
    _checks.floating("scores", scores)
    _checks.mask("mask", mask)
    _checks.shape("mask", mask, logprobs.shape, "logprobs' shape")
    if cu_seqlens is not None:
        _checks.cu_seqlens("cu_seqlens", cu_seqlens, "logprobs", logprobs)
    elif logprobs.dim() != 2:
        raise ValueError(f"logprobs has shape {list(logprobs.shape)}, expected [B, T], or [total] with cu_seqlens")
    sequences = logprobs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _checks.shape("scores", scores, (sequences,), "one a sequence")
    for name, value in (("scores", scores), ("mask", mask)):
        _checks.same_device(name, value, "logprobs", logprobs)


@custom_op("approx_kl")
def _approx_kl(logprobs: Tensor, ref_logprobs: Tensor, kind: int) -> Tensor:
    return native.approx_kl(logprobs, ref_logprobs, kind)


@torch.library.register_fake("fastppo::approx_kl")
def _(logprobs, ref_logprobs, kind):
    return logprobs.new_empty(logprobs.shape, dtype=torch.float32)


@custom_op("approx_kl_backward")
def _approx_kl_backward(logprobs: Tensor, ref_logprobs: Tensor, d_kl: Tensor, kind: int) -> Tensor:
    return native.approx_kl_backward(logprobs, ref_logprobs, d_kl, kind)


@torch.library.register_fake("fastppo::approx_kl_backward")
def _(logprobs, ref_logprobs, d_kl, kind):
    return logprobs.new_empty(logprobs.shape, dtype=torch.float32)


def _setup_context(ctx, inputs, outputs) -> None:
    ctx.save_for_backward(inputs.logprobs, inputs.ref_logprobs)
    ctx.kind = inputs.kind


def _backward(ctx, d_kl):
    logprobs, ref_logprobs = ctx.saved_tensors
    grad = _approx_kl_backward(logprobs, ref_logprobs, d_kl, ctx.kind)
    _, ref_wanted = ctx.wanted
    return grad.to(logprobs.dtype), (-grad).to(ref_logprobs.dtype) if ref_wanted else None


register_gradient(_approx_kl, ("logprobs", "ref_logprobs"), _setup_context, _backward)


@custom_op("kl_shaped_rewards")
def _kl_shaped_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    coef: float,
    kind: int,
) -> Tensor:
    return native.kl_shaped_rewards(scores, logprobs, ref_logprobs, mask, cu_seqlens, coef, kind)


@torch.library.register_fake("fastppo::kl_shaped_rewards")
def _(scores, logprobs, ref_logprobs, mask, cu_seqlens, coef, kind):
    return logprobs.new_empty(logprobs.shape, dtype=torch.float32)
