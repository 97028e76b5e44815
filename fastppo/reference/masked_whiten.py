"""Mean and whitening of the elements inside a mask, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

VARIANCE_FLOOR = 1e-8


def masked_moments(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """fp64 0-d: n = number of elements where mask is set, mean = sum x / n, sum (x - mean)^2; zeros when n = 0.

    x [...] floating, mask bool of the same shape (None: all). The mean is taken off before squaring, so a large one
    costs no digits.
    """
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    count = keep.sum(dtype=torch.float64)
    kept = torch.where(keep, x, 0).double()
    mean = kept.sum() / count.clamp_min(1)
    squares = torch.where(keep, kept - mean, 0).square().sum()
    return count, mean, squares


def masked_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """sum of x where mask is set / number of such elements; 0 where there is none. fp32 0-d (fp64 for fp64)."""
    return masked_moments(x, mask)[1].to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def masked_whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    moments: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) where mask is set, 0 elsewhere; with shift_mean=False the mean is added back.

    moments: `masked_moments` of a larger set that x is part of; None: of x. variance = sum (x - mean)^2 / (n - 1)
    (Bessel), 0 for n <= 1. Epsilon inside the root as in TRL and verl. fp32 in the shape of x (fp64 for fp64).
    """
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    count, mean, squares = masked_moments(x, mask) if moments is None else moments
    variance = torch.where(count > 1, squares / (count - 1).clamp_min(1), 0)
    white = (torch.where(keep, x, 0).double() - mean) * (variance + VARIANCE_FLOOR).rsqrt()
    if not shift_mean:
        white = white + mean
    return torch.where(keep, white, 0).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
