"""The RMS norm of rows, with the residual sum before it, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """normed = total / sqrt(mean(total^2) + eps) * weight over the last dimension (arXiv:1910.07467, eq. 4), total = x + residual.

    x and residual [..., H], weight [H]; without a residual normed alone, with one (normed, total), both in x's type. The total is rounded to it
    first and normalised in fp32 or wider.
    """
    total = x if residual is None else x + residual
    wide = total.to(torch.promote_types(x.dtype, torch.float32))
    inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = (wide * inverse_rms * weight.to(wide.dtype)).to(x.dtype)
    return normed if residual is None else (normed, total)
