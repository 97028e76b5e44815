"""Attention of one new token a sequence over a paged key-value cache, and the write into that cache."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.native import decode_attention as native
from fastppo.ops import _checks
from fastppo.ops._backends import choose
from fastppo.ops._registry import custom_op
from fastppo.reference import decode_attention as reference

MAX_HEAD_SIZE = 256
"""Of the kernels; larger heads go to the reference."""


def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(softcap * tanh(scale * q k^T / softcap)) v over the keys of each sequence, found through its block table.

    The result of a sequence does not depend on the others in the batch, bit for bit: its keys are always summed in the same tiles.

    Args:
        q: [B, Hq, D] float32, bfloat16 or float16: the query of each sequence's newest token, whose key is in the cache already.
        k_pages, v_pages: [P, page, Hkv, D] and [P, page, Hkv, Dv] in q's dtype; Hq a multiple of Hkv (grouped-query attention,
            arXiv:2305.13245).
        block_table: int32 [B, blocks]: the pages of a sequence, in order; entries beyond its length are not looked at.
        context_lens: int32 [B], keys of each sequence, 0 <= length <= blocks * page; 0 gives a result of 0.
        scale: multiplies the scores; by default D ** -0.5.
        softcap: score soft-capping (Gemma 2), or None.
        window: only the last `window` keys are seen, or None.
        sinks: float32 [Hq], a learned logit in each softmax's denominator (gpt-oss), or None.

    Returns:
        [B, Hq, Dv] in q's dtype; accumulated in fp32. Not differentiable.

    Raises:
        TypeError, ValueError: wrong type, shape or device, or (on the CPU) a length or a page out of range.
    """
    _check_decode_attention(q, k_pages, v_pages, block_table, context_lens, sinks)
    scale = q.shape[-1] ** -0.5 if scale is None else _checks.number("scale", scale)
    if softcap is not None:
        _checks.number("softcap", softcap, above=0)
    if window is not None:
        _checks.number("window", window, at_least=1)
    with torch.no_grad():
        if max(q.shape[-1], v_pages.shape[-1]) > MAX_HEAD_SIZE or choose("decode_attention", q) == "reference":
            options = {"scale": scale, "softcap": softcap, "window": window, "sinks": sinks}
            return reference.decode_attention(q, k_pages, v_pages, block_table, context_lens, **options)
        return _decode_attention(
            q, k_pages, v_pages, block_table, context_lens, scale, softcap or 0.0, window or 0, sinks
        )


def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """Write keys and values [T, Hkv, D] into places `slots` of the paged caches, in place.

    k, v: the caches' dtype (float32, bfloat16 or float16). slots: int64 [T] = page * page_size + offset, each at most once; a negative
    one is skipped. Raises ValueError (on the CPU) when a slot lies beyond the cache; nothing is written then.
    """
    _check_write_kv(k, v, k_pages, v_pages, slots)
    with torch.no_grad():
        if choose("decode_attention", k) == "reference":
            reference.write_kv(k, v, k_pages, v_pages, slots)
        elif len(slots):
            _write_kv(k, v, k_pages, v_pages, slots)


def _check_caches(k_pages: Tensor, v_pages: Tensor, like: Tensor, like_name: str) -> None:
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        _checks.tensor(name, pages)
        if pages.dtype != like.dtype:
            raise TypeError(f"{name} has dtype {pages.dtype}, expected {like.dtype} like {like_name}")
        if pages.dim() != 4 or not pages.is_contiguous():
            raise ValueError(f"{name} has shape {list(pages.shape)}, expected a contiguous [P, page, Hkv, D]")
        _checks.same_device(name, pages, like_name, like)
    _checks.shape("v_pages", v_pages[..., 0], k_pages.shape[:3], "k_pages' leading shape")


def _check_decode_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, context_lens: Tensor, sinks: Tensor | None
) -> None:
    _checks.floating("q", q)
    if q.dim() != 3:
        raise ValueError(f"q has shape {list(q.shape)}, expected [B, Hq, D]")
    _check_caches(k_pages, v_pages, q, "q")
    batch, heads, head_size = q.shape
    _, _, kv_heads, key_size = k_pages.shape
    if heads % kv_heads or key_size != head_size:
        raise ValueError(
            f"q has shape {list(q.shape)} and k_pages {list(k_pages.shape)}, "
            "expected Hq to be a multiple of Hkv and equal head sizes"
        )
    for name, table in (("block_table", block_table), ("context_lens", context_lens)):
        _checks.tensor(name, table)
        if table.dtype != torch.int32:
            raise TypeError(f"{name} has dtype {table.dtype}, expected int32")
        _checks.same_device(name, table, "q", q)
    if block_table.dim() != 2 or len(block_table) != batch:
        raise ValueError(f"block_table has shape {list(block_table.shape)}, expected [{batch}, blocks] (q's batch)")
    _checks.shape("context_lens", context_lens, (batch,), "q's batch")
    if sinks is not None:
        _checks.floating("sinks", sinks)
        _checks.shape("sinks", sinks, (heads,), "q's heads")


def _check_write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    _checks.floating("k", k)
    _checks.floating("v", v)
    _check_caches(k_pages, v_pages, k, "k")
    _checks.tensor("slots", slots)
    if slots.dtype != torch.int64 or slots.dim() != 1:
        raise TypeError(f"slots is {slots.dtype} of shape {list(slots.shape)}, expected int64 [T]")
    _checks.shape("k", k, (len(slots), *k_pages.shape[2:]), "slots and k_pages")
    _checks.shape("v", v, (len(slots), *v_pages.shape[2:]), "slots and v_pages")


def _with_packed_heads(x: Tensor) -> Tensor:
    """`x` [N, heads, size] with its last two dimensions contiguous; the first may have any stride."""
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()


@custom_op("decode_attention")
def _decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    softcap: float,
    window: int,
    sinks: Tensor | None,
) -> Tensor:
    sinks = None if sinks is None else sinks.float().contiguous()
    return native.decode_attention(
        _with_packed_heads(q), k_pages, v_pages, block_table.contiguous(), context_lens.contiguous(),
        scale, softcap, window, sinks,
    )  # fmt: skip


@torch.library.register_fake("fastppo::decode_attention")
def _(q, k_pages, v_pages, block_table, context_lens, scale, softcap, window, sinks):
    return q.new_empty((*q.shape[:2], v_pages.shape[-1]))


@custom_op("write_kv", mutates_args={"k_pages", "v_pages"})
def _write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    native.write_kv(_with_packed_heads(k), _with_packed_heads(v), k_pages, v_pages, slots.contiguous())
