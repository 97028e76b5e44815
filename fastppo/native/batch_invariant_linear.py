"""Allocates the output of `batch_invariant_linear` and calls the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.native import _C, DTYPE_CODES, address, on_huge_pages, threads


def batch_invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K], weight [N, K] with consecutive elements in its rows, contiguous bias [N], one dtype -> [..., N] in it."""
    columns, inner = weight.shape
    if not x.is_contiguous():
        x = x.contiguous()
    out = on_huge_pages(torch.empty((*x.shape[:-1], columns), dtype=x.dtype, device=x.device))
    rows = out.numel() // max(columns, 1)
    _C.matmul(
        x.data_ptr(), weight.data_ptr(), address(bias), out.data_ptr(), DTYPE_CODES[x.dtype],
        rows, columns, inner, (inner, 1, 1, weight.stride(0), columns), False, threads(),
    )  # fmt: skip
    return out
