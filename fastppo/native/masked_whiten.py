"""Allocates the outputs of `masked_whiten` and calls the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.native import _C, address, column, flat_float, on_cuda, stream, threads


def masked_moments(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sum of squared deviations (fp64 0-d) of the elements of `x` where `mask` (same shape) is set."""
    mask = None if mask is None else mask.contiguous()
    if on_cuda(x):
        x = x.contiguous()
        partial = x.new_empty((_C.cuda.MAX_PARTIAL_MOMENTS, 3), dtype=torch.float64)
        moments = tuple(x.new_empty((), dtype=torch.float64) for _ in range(3))
        _C.cuda.masked_moments(
            column(x), address(mask), x.numel(), address(partial), list(map(address, moments)), stream(x)
        )
        return moments
    x = flat_float(x)
    moments = _C.masked_moments(address(x), address(mask), x.numel(), threads())
    return tuple(torch.tensor(moment, dtype=torch.float64, device=x.device) for moment in moments)


def masked_whiten(
    x: Tensor, mask: Tensor | None, count: Tensor, mean: Tensor, squares: Tensor, keep_mean: bool
) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8), plus the mean with `keep_mean`; fp32 in the shape of `x`, 0 where masked."""
    mask = None if mask is None else mask.contiguous()
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if on_cuda(x):
        x, moments = x.contiguous(), [address(moment) for moment in (count, mean, squares)]
        _C.cuda.masked_whiten(column(x), address(mask), x.numel(), moments, keep_mean, address(out), stream(x))
        return out
    x, moments = flat_float(x), (count.item(), mean.item(), squares.item())
    _C.masked_whiten(address(x), address(mask), x.numel(), moments, keep_mean, address(out), threads())
    return out
