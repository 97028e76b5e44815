"""What a decode step of a Llama-like decoder does between its matrix products, rounded where Transformers' modules round.

One kernel each for a residual sum with its norm, for placing the heads (norm, rotation, write into the paged cache) and for the gate; the first and
the last are those of `rms_norm` and `swiglu`. As PyTorch's operations they are about forty kernels a layer, each of which takes a GPU longer to
start than to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rms_norm import inverse_rms, normed, rms_norm_forward
from .rotary_embedding import rotated
from .swiglu import swiglu_forward

HEAD_WARPS = 1  # a head is at most 256 elements


@triton.jit
def _placed_head(
    x_ptr,
    norm_ptr,
    eps,
    cos_ptr,
    sin_ptr,
    HAS_NORM: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A head [D] after its norm, its first ROTARY elements rotated (arXiv:2104.09864): element i of a half with element i of the other."""
    offs = tl.arange(0, BLOCK_D)
    mask, turns, first = offs < D, offs < ROTARY, offs < ROTARY // 2
    partner = tl.where(first, offs + ROTARY // 2, offs - ROTARY // 2)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    other = tl.load(x_ptr + partner, mask=turns, other=0.0)
    if HAS_NORM:
        factor = inverse_rms(x.to(tl.float32), D, eps)
        x = normed(x, factor, tl.load(norm_ptr + offs, mask=mask, other=0.0))
        other = normed(other, factor, tl.load(norm_ptr + partner, mask=turns, other=0.0))
    cos = tl.load(cos_ptr + offs, mask=turns, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + offs, mask=turns, other=0.0).to(tl.float32)
    return tl.where(turns, rotated(x, other, cos, sin, first), x)


@triton.jit(do_not_specialize=["pages", "capacity"])
def _place_heads_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    lengths_ptr,
    block_table_ptr,
    out_ptr,
    k_pages_ptr,
    v_pages_ptr,
    heads,
    kv_heads,
    pages,
    capacity,
    stride_table,
    stride_k_page,
    stride_v_page,
    q_eps,
    k_eps,
    HAS_Q_NORM: tl.constexpr,
    HAS_K_NORM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program for one head of one row's query, key or value [B, heads or kv_heads, D], at position length - 1.

    Queries go to out [B, heads, D], keys and values to their pages [P, PAGE_SIZE, kv_heads, D]. A position outside of [0, capacity) or a page
    outside of [0, pages) is not written: `decode_attention` gives NaN for it, and 0 for a length of 0.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    offs = tl.arange(0, BLOCK_D)
    mask = offs < D
    position = tl.load(lengths_ptr + row).to(tl.int64) - 1
    if (position < 0) | (position >= capacity):
        return
    cos, sin = cos_ptr + position * ROTARY, sin_ptr + position * ROTARY
    if head < heads:
        place = (row * heads + head) * D
        q = _placed_head(q_ptr + place, q_norm_ptr, q_eps, cos, sin, HAS_Q_NORM, D, ROTARY, BLOCK_D)
        tl.store(out_ptr + place + offs, q, mask=mask)
    else:
        page = tl.load(block_table_ptr + row * stride_table + position // PAGE_SIZE).to(tl.int64)
        if (page >= 0) & (page < pages):
            kv_head = (head - heads) % kv_heads
            source = (row * kv_heads + kv_head) * D
            target = (position % PAGE_SIZE * kv_heads + kv_head) * D
            if head < heads + kv_heads:
                k = _placed_head(k_ptr + source, k_norm_ptr, k_eps, cos, sin, HAS_K_NORM, D, ROTARY, BLOCK_D)
                tl.store(k_pages_ptr + page * stride_k_page + target + offs, k, mask=mask)
            else:
                v = tl.load(v_ptr + source + offs, mask=mask)
                tl.store(v_pages_ptr + page * stride_v_page + target + offs, v, mask=mask)


def add_rms_norm(x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """x [B, H] += update (where there is one), in place; returns its RMS norm times weight [H]. All contiguous and of one type."""
    return rms_norm_forward(x, update, weight, eps, in_place=True, stepwise=True)[0]


def place_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: tuple[Tensor | None, float],
    k_norm: tuple[Tensor | None, float],
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
) -> Tensor:
    """Norms, rotates and stores the heads of each row's newest token; returns the queries [B, Hq, D].

    q [B, Hq * D], k and v [B, Hkv * D], norms (weight [D] or None, eps), cos and sin [positions, rotary size], lengths int64 [B], block_table int32
    [B, blocks], pages [P, page, Hkv, D]. Everything but the tables' first dimension is contiguous, and of one type.
    """
    pages, page_size, kv_heads, head_size = k_pages.shape
    heads = q.shape[1] // head_size
    out = torch.empty((len(q), heads, head_size), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(q):
        _place_heads_kernel[(len(q), heads + 2 * kv_heads)](
            q,
            k,
            v,
            q if q_norm[0] is None else q_norm[0],
            k if k_norm[0] is None else k_norm[0],
            cos,
            sin,
            lengths,
            block_table,
            out,
            k_pages,
            v_pages,
            heads,
            kv_heads,
            pages,
            min(len(cos), block_table.shape[1] * page_size),
            block_table.stride(0),
            k_pages.stride(0),
            v_pages.stride(0),
            q_norm[1],
            k_norm[1],
            HAS_Q_NORM=q_norm[0] is not None,
            HAS_K_NORM=k_norm[0] is not None,
            PAGE_SIZE=page_size,
            D=head_size,
            ROTARY=cos.shape[1],
            BLOCK_D=triton.next_power_of_2(head_size),
            num_warps=HEAD_WARPS,
        )
    return out


def apply_gate(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in place of `gate`; both [B, I], contiguous and of one type."""
    return swiglu_forward(gate, up, gate, stepwise=True)
