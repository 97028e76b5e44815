"""The rotary embedding of heads [N, heads, D] at their positions, and its transpose."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements of one program
NUM_WARPS = 4


@triton.jit
def rotated(x, other, cos, sin, negative):
    """x * cos + other * sin, `other` negated where asked; rounded to x's type after each product and the sum: to none where that is fp32."""
    along = (x.to(tl.float32) * cos).to(x.dtype).to(tl.float32)
    across = (tl.where(negative, -other.to(tl.float32), other.to(tl.float32)) * sin).to(x.dtype).to(tl.float32)
    return (along + across).to(x.dtype)


@triton.jit(do_not_specialize=["places"])
def _rotary_embedding_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    out_ptr,
    heads,
    places,
    stride_x_n,
    BACKWARD: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program for BLOCK_HEADS heads of one token of x [N, heads, D], cos and sin [places, ROTARY], positions [N].

    Element i of a half goes with element i of the other (arXiv:2104.09864). A position outside the tables is not looked up: it gives NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    offs = tl.arange(0, BLOCK_D)
    turns, first = offs < ROTARY, offs < ROTARY // 2
    partner = tl.where(first, offs + ROTARY // 2, offs - ROTARY // 2)
    mask_head = (head < heads)[:, None]
    source = x_ptr + row * stride_x_n + head[:, None] * D
    x = tl.load(source + offs[None, :], mask=mask_head & (offs < D)[None, :], other=0.0).to(tl.float32)
    other = tl.load(source + partner[None, :], mask=mask_head & turns[None, :], other=0.0).to(tl.float32)
    position = tl.load(positions_ptr + row).to(tl.int64)
    known = offs < tl.where((position >= 0) & (position < places), ROTARY, 0)
    cos = tl.load(cos_ptr + position * ROTARY + offs, mask=known, other=float("nan")).to(tl.float32)
    if BACKWARD:  # the transposed rotation: the partner's sine, and the other sign
        sin = tl.load(sin_ptr + position * ROTARY + partner, mask=known, other=float("nan")).to(tl.float32)
        negative = turns & (offs >= ROTARY // 2)
    else:
        sin = tl.load(sin_ptr + position * ROTARY + offs, mask=known, other=float("nan")).to(tl.float32)
        negative = first
    out = tl.where(turns[None, :], rotated(x, other, cos[None, :], sin[None, :], negative[None, :]), x)
    place = out_ptr + (row * heads + head[:, None]) * D + offs[None, :]
    tl.store(place, out, mask=mask_head & (offs < D)[None, :])


def blocks(heads: int, head_size: int) -> dict[str, int]:
    block_d = triton.next_power_of_2(head_size)
    return {"BLOCK_HEADS": max(1, min(triton.next_power_of_2(heads), BLOCK // block_d)), "BLOCK_D": block_d}


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, backward: bool = False) -> Tensor:
    """x [N, heads, D] with contiguous heads, cos and sin [P, R], positions [N] int64 or int32 -> [N, heads, D] in x's type.

    backward: x is the gradient of what was turned, and the result that of what was to be.
    """
    rows, heads, head_size = x.shape
    out = torch.empty((rows, heads, head_size), dtype=x.dtype, device=x.device)
    if out.numel():
        tile = blocks(heads, head_size)
        with torch.cuda.device_of(x):
            _rotary_embedding_kernel[(rows, triton.cdiv(heads, tile["BLOCK_HEADS"]))](
                x,
                cos,
                sin,
                positions,
                out,
                heads,
                len(cos),
                x.stride(0),
                BACKWARD=backward,
                D=head_size,
                ROTARY=cos.shape[1],
                num_warps=NUM_WARPS,
                **tile,
            )
    return out
