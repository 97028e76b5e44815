"""Allocates the output of `rotary_embedding` and calls the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.native import _C, threads


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, backward: bool = False) -> Tensor:
    """x fp32 [N, heads, D] with contiguous heads, cos and sin [P, R], positions int64 [N] in [0, P) -> [N, heads, D]."""
    rows, heads, head_size = x.shape
    out = torch.empty((rows, heads, head_size), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    sizes = (rows, heads, head_size, cos.shape[1], x.stride(0))
    addresses = (x.data_ptr(), cos.data_ptr(), sin.data_ptr(), positions.data_ptr())
    _C.rotary_embedding(*addresses, sizes, backward, out.data_ptr(), threads())
    return out
