"""Attention of one new token a sequence over a paged key-value cache, and the write into that cache."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.native import decode_attention as native
from fastppo.ops import _checks
from fastppo.ops._backends import choose
from fastppo.ops._registry import custom_op
from fastppo.reference import decode_attention as reference


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
        k_pages, v_pages: [P, page, Hkv, D] and [P, page, Hkv, Dv] in q's dtype, contiguous within a page: both may be views of one
            cache [P, 2, page, Hkv, D]. Hq a multiple of Hkv (grouped-query attention, arXiv:2305.13245).
        block_table: int32 or int64 [B, blocks]: the pages of a sequence, in order; entries whose keys lie beyond its length, or before
            its window, are not looked at. Sequences may share pages.
        context_lens: int32 or int64 [B], keys of each sequence, 0 <= length <= blocks * page; 0 gives a result of 0.
        scale: multiplies the scores; by default D ** -0.5.
        softcap: score soft-capping (Gemma 2), or None.
        window: only the last `window` keys are seen, or None.
        sinks: float32 [Hq], a learned logit in each softmax's denominator (gpt-oss), or None.

    Returns:
        [B, Hq, Dv] in q's dtype; accumulated in fp32. Not differentiable.

    Raises:
        TypeError, ValueError: wrong type, shape or device, or (on the CPU) a length or a page out of range; on a GPU, where the host
            does not wait, that sequence's result is NaN and nothing outside the cache is read.
    """
    _check_decode_attention(q, k_pages, v_pages, block_table, context_lens, sinks)
    scale = q.shape[-1] ** -0.5 if scale is None else _checks.number("scale", scale)
    if softcap is not None:
        _checks.number("softcap", softcap, above=0)
    if window is not None:
        _checks.number("window", window, at_least=1)
    with torch.no_grad():
        too_wide = max(q.shape[-1], v_pages.shape[-1]) > native.MAX_HEAD_SIZE
        backend = "reference" if too_wide else choose("decode_attention", q)
        if backend == "reference":
            options = {"scale": scale, "softcap": softcap, "window": window, "sinks": sinks}
            return reference.decode_attention(q, k_pages, v_pages, block_table, context_lens, **options)
        options = (scale, softcap or 0.0, window or 0, sinks, backend)
        return _decode_attention(q, k_pages, v_pages, block_table, context_lens, *options)


def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """Write keys and values [T, Hkv, D] into places `slots` of the paged caches, in place.

    k, v: the caches' dtype (float32, bfloat16 or float16). slots: int64 or int32 [T] = page * page_size + offset, each at most once; a
    negative one is skipped. One beyond the cache raises ValueError on the CPU, before anything is written, and is skipped on a GPU.
    """
    _check_write_kv(k, v, k_pages, v_pages, slots)
    with torch.no_grad():
        backend = choose("decode_attention", k)
        if backend == "reference":
            reference.write_kv(k, v, k_pages, v_pages, slots)
        elif len(slots):
            _write_kv(k, v, k_pages, v_pages, slots, backend)


def _check_caches(k_pages: Tensor, v_pages: Tensor, like: Tensor, like_name: str) -> None:
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        _checks.same_dtype(name, pages, like_name, like)
        if pages.dim() != 4 or not pages[:1].is_contiguous() or 0 in pages.shape[1:3]:
            raise ValueError(
                f"{name} has shape {list(pages.shape)} and strides {list(pages.stride())}, "
                "expected [P, page, Hkv, D] that is contiguous within a page, page and Hkv at least 1"
            )
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
        _checks.integer(name, table)
        _checks.same_device(name, table, "q", q)
    if block_table.dim() != 2 or len(block_table) != batch:
        raise ValueError(f"block_table has shape {list(block_table.shape)}, expected [{batch}, blocks] (q's batch)")
    _checks.shape("context_lens", context_lens, (batch,), "q's batch")
    if sinks is not None:
        _checks.floating("sinks", sinks)
        _checks.shape("sinks", sinks, (heads,), "q's heads")
        _checks.same_device("sinks", sinks, "q", q)


def _check_write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    _checks.floating("k", k)
    _checks.same_dtype("v", v, "k", k)
    _checks.same_device("v", v, "k", k)
    _check_caches(k_pages, v_pages, k, "k")
    _checks.integer("slots", slots)
    _checks.same_device("slots", slots, "k", k)
    if slots.dim() != 1:
        raise ValueError(f"slots has shape {list(slots.shape)}, expected [T]")
    _checks.shape("k", k, (len(slots), *k_pages.shape[2:]), "slots and k_pages")
    _checks.shape("v", v, (len(slots), *v_pages.shape[2:]), "slots and v_pages")


def _with_packed_heads(x: Tensor) -> Tensor:
    """`x` [N, heads, size] with its last two dimensions contiguous; the first may have any stride."""
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()


def _as_int32(x: Tensor) -> Tensor:
    """Contiguous; what is out of int32's range stays out of every range."""
    return (x if x.dtype == torch.int32 else x.clamp(-1, (1 << 31) - 1).int()).contiguous()


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
    backend: str,
) -> Tensor:
    sinks = None if sinks is None else sinks.float().contiguous()
    if backend == "triton":
        from fastppo.kernels.decode_attention import decode_attention as kernel

        q, block_table = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, block_table))
        return kernel(q, k_pages, v_pages, block_table, context_lens.contiguous(), scale, softcap, window, sinks)[0]
    return native.decode_attention(
        _with_packed_heads(q), k_pages, v_pages, _as_int32(block_table), _as_int32(context_lens),
        scale, softcap, window, sinks,
    )  # fmt: skip


@torch.library.register_fake("fastppo::decode_attention")
def _(q, k_pages, v_pages, block_table, context_lens, scale, softcap, window, sinks, backend):
    return q.new_empty((*q.shape[:2], v_pages.shape[-1]))


@custom_op("write_kv", mutates_args=("k_pages", "v_pages"))
def _write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor, backend: str) -> None:
    if backend == "triton":
        from fastppo.kernels.decode_attention import write_kv as kernel

        k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
        return kernel(k, v, k_pages, v_pages, slots.contiguous())
    native.write_kv(_with_packed_heads(k), _with_packed_heads(v), k_pages, v_pages, slots.long().contiguous())
