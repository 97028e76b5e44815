"""Allocates the outputs of `decode_attention` and `write_kv` and calls the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.native import _C, DTYPE_CODES, address, check_same, threads

MAX_HEAD_SIZE = 256  # larger heads go to the reference
check_same("MAX_HEAD_SIZE", MAX_HEAD_SIZE)


def decode_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, context_lens: Tensor,
    scale: float, softcap: float, window: int, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """q [B, Hq, D] with its last two dimensions contiguous, caches contiguous within a page, int32 tables -> [B, Hq, Dv] in q's dtype."""
    batch, heads, head_size = q.shape
    pages, page_size, kv_heads, value_size = v_pages.shape
    out = torch.empty((batch, heads, value_size), dtype=q.dtype, device=q.device)
    bad = _C.decode_attention(
        address(q), address(k_pages), address(v_pages), address(block_table), address(context_lens), address(sinks),
        address(out), DTYPE_CODES[q.dtype], batch, heads, kv_heads, pages, page_size, block_table.shape[1], q.stride(0),
        k_pages.stride(0), v_pages.stride(0), head_size, value_size, scale, softcap, window, threads(),
    )  # fmt: skip
    if bad >= 0:
        used = max(0, -(-int(context_lens[bad]) // page_size))
        raise ValueError(
            f"context_lens[{bad}] is {int(context_lens[bad])} and block_table[{bad}] begins {block_table[bad, :used].tolist()}, "
            f"expected a length in [0, {block_table.shape[1] * page_size}] and pages in [0, {pages})"
        )
    return out


def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """k, v [T, Hkv, D] whose last two dimensions are contiguous, into caches of the same dtype, contiguous within a page; slots int64 [T]."""
    size = k.element_size()
    bad = _C.write_kv(
        address(k), address(v), address(k_pages), address(v_pages), address(slots), len(slots), k_pages.shape[0],
        k_pages.shape[1], k.stride(0) * size, v.stride(0) * size, k[0].numel() * size, v[0].numel() * size,
        k_pages.stride(0) * size, v_pages.stride(0) * size,
    )  # fmt: skip
    if bad >= 0:
        places = k_pages.shape[0] * k_pages.shape[1]
        raise ValueError(f"slots[{bad}] is {int(slots[bad])}, expected less than the cache's {places} places")
