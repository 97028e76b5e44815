"""Allocates the outputs of `masked_whiten` and calls the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.native import _C, address, flat_float, threads


def masked_moments(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sum of squared deviations (fp64 0-d) of the elements of `x` where `mask` (same shape) is set."""
    x, mask = flat_float(x), None if mask is None else mask.contiguous()
    moments = _C.masked_moments(address(x), address(mask), x.numel(), threads())
    return tuple(torch.tensor(moment, dtype=torch.float64) for moment in moments)


def masked_whiten(
    x: Tensor, mask: Tensor | None, count: Tensor, mean: Tensor, squares: Tensor, keep_mean: bool
) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8), plus the mean with `keep_mean`; fp32 in the shape of `x`, 0 where masked."""
    x, mask = flat_float(x), None if mask is None else mask.contiguous()
    out = torch.empty(x.shape, dtype=torch.float32)
    moments = (count.item(), mean.item(), squares.item())
    _C.masked_whiten(address(x), address(mask), x.numel(), moments, keep_mean, address(out), threads())
    return out
