"""Allocates the outputs of `packed_attention` and calls the kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.native import _C, threads


class Layout(NamedTuple):
    """Where sequences lie in T packed tokens, which of them share some, and Q queries: of each sequence's tokens all, or the last ones.

    sequences: int64 [S, 6], of each the first token of a prompt that stands apart and one past its last, the same of its own tokens, the
    first of these that is a query, and that query's row among the Q.
    groups: int64 [G + 1], bounds of runs of sequences; those of different groups share no token.
    """

    sequences: Tensor
    groups: Tensor


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """fp32 q [Q, Hq, D], k and v [T, Hkv, D], contiguous heads -> (out [Q, Hq, D], log-sum-exps [Q, Hq])."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=q.dtype, device=q.device)
    _C.packed_attention(_arguments(q, k, v, layout, out, lse, scale, window), threads())
    return out, lse


def packed_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of `out`, contiguous [Q, Hq, D]."""
    gradients = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    _C.packed_attention_backward(
        _arguments(q, k, v, layout, out, lse, scale, window),
        [x.data_ptr() for x in (d_out, *gradients)],
        (layout.groups.data_ptr(), len(layout.groups) - 1),
        threads(),
    )
    return tuple(gradients)


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, out: Tensor, lse: Tensor, scale: float, window: int | None
) -> tuple:
    addresses = [x.data_ptr() for x in (q, k, v, layout.sequences, out, lse)]
    sizes = len(layout.sequences), q.shape[1], *k.shape[1:], q.stride(0), k.stride(0), v.stride(0)
    return addresses, sizes, scale, window or 0
