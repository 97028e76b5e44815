"""Calls the CPU's matrix product, whose sums have one order whatever the shapes and the threads."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.native import _C, DTYPE_CODES, address, on_huge_pages, threads


def matmul(
    a: Tensor, b: Tensor, out: Tensor | None = None, *, bias: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """a [M, K] @ b [K, N] -> [M, N] in their type; contiguous `bias` [N] is added last, and to `accumulate` (float32) what `out` holds first.

    a may have any strides. One of b's strides has to be 1, and out's last one.
    """
    (rows, inner), columns = a.shape, b.shape[1]
    if out is None:
        out = on_huge_pages(torch.empty((rows, columns), dtype=a.dtype, device=a.device))
    strides = (*a.stride(), *b.stride(), out.stride(0))
    _C.matmul(
        a.data_ptr(), b.data_ptr(), address(bias), out.data_ptr(), DTYPE_CODES[a.dtype],
        rows, columns, inner, strides, accumulate, threads(),
    )  # fmt: skip
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [M, K], weight [N, K] and bias [N] -> x weight^T + bias [M, N]."""
    return matmul(x, weight.t(), bias=bias)
