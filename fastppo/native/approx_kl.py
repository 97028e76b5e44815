"""Allocates the outputs of `approx_kl` and `kl_shaped_rewards` and calls the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.native import (
    _C,
    address,
    as_offsets,
    check_same,
    codes,
    column,
    flat_float,
    on_cuda,
    sequences,
    stream,
    threads,
)

KL_KINDS = ("k1", "k2", "k3", "abs", "k1+", "k3+")
check_same("KL_KINDS", codes(KL_KINDS))


def approx_kl(logprobs: Tensor, ref_logprobs: Tensor, kind: int) -> Tensor:
    """KL estimate of each element, fp32 in the shape of `logprobs`; `kind` is a place in KL_KINDS."""
    if on_cuda(logprobs):
        logprobs, ref_logprobs = logprobs.contiguous(), ref_logprobs.contiguous()
        kl = torch.empty_like(logprobs, dtype=torch.float32)
        _C.cuda.approx_kl(column(logprobs), column(ref_logprobs), kl.numel(), kind, address(kl), stream(kl))
        return kl
    logprobs, ref_logprobs = flat_float(logprobs), flat_float(ref_logprobs)
    kl = torch.empty_like(logprobs)
    _C.approx_kl(address(logprobs), address(ref_logprobs), kl.numel(), kind, address(kl), threads())
    return kl


def approx_kl_backward(logprobs: Tensor, ref_logprobs: Tensor, d_kl: Tensor, kind: int) -> Tensor:
    """fp32 gradient of `logprobs`; that of `ref_logprobs` is its negative."""
    d_kl = flat_float(d_kl)
    grad = torch.empty_like(d_kl)
    if on_cuda(logprobs):
        logprobs, ref_logprobs = logprobs.contiguous(), ref_logprobs.contiguous()
        outputs = grad.numel(), kind, address(grad), stream(grad)
        _C.cuda.approx_kl_backward(column(logprobs), column(ref_logprobs), address(d_kl), *outputs)
        return grad
    logprobs, ref_logprobs = flat_float(logprobs), flat_float(ref_logprobs)
    _C.approx_kl_backward(
        address(logprobs), address(ref_logprobs), address(d_kl), grad.numel(), kind, address(grad), threads()
    )
    return grad


def kl_shaped_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, cu_seqlens: Tensor | None,
    coef: float, kind: int,
) -> Tensor:  # fmt: skip
    """-coef * kl at masked-in tokens plus scores [B] at each sequence's last of them; fp32 in logprobs' shape."""
    offsets = as_offsets(cu_seqlens, logprobs.shape[0])
    shape = sequences(logprobs, offsets)
    rewards = torch.empty(logprobs.shape, dtype=torch.float32, device=logprobs.device)
    mask = mask.contiguous()
    if on_cuda(logprobs):
        scores, logprobs, ref_logprobs = scores.contiguous(), logprobs.contiguous(), ref_logprobs.contiguous()
        _C.cuda.kl_shaped_rewards(
            column(scores), column(logprobs), column(ref_logprobs), address(mask), shape, rewards.numel(),
            coef, kind, address(rewards), stream(rewards),
        )  # fmt: skip
        return rewards
    scores, logprobs, ref_logprobs = flat_float(scores), flat_float(logprobs), flat_float(ref_logprobs)
    _C.kl_shaped_rewards(
        address(scores), address(logprobs), address(ref_logprobs), address(mask), shape,
        coef, kind, address(rewards), threads(),
    )  # fmt: skip
    return rewards
