"""x W^T + b with a fixed order of additions: a row's result does not depend on how many rows there are, nor on which.

A decode step multiplies few rows, so reading the weights is what takes time. Each program reads its part of the weights once for up to 64
(16 in fp32) rows. Where the columns alone would leave most of a GPU idle, K is cut into parts as well, whose number depends on the shape of
the weights alone, and a second kernel adds the parts in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 64
ENOUGH_PROGRAMS = 264  # two for each multiprocessor of an H200
LEAST_PART = 256  # of K
MERGE_BLOCK = 512
ALIGNED_LAUNCH = {"num_warps": 4, "num_stages": 3}
UNALIGNED_LAUNCH = {"num_warps": 8, "num_stages": 2}
MERGE_WARPS = 4


@triton.jit(do_not_specialize=["rows"])
def _batch_invariant_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    N,
    K,
    part,
    stride_x,
    stride_weight,
    HAS_BIAS: tl.constexpr,
    ONE_PART: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program for BLOCK_R rows, BLOCK_N columns and elements [p * part, (p + 1) * part) of K.

    x [rows, K], weight [N, K], bias [N]. ONE_PART: out [rows, N] is the result, else fp32 [parts, rows, N] the sums of the parts.
    """
    row = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_r, mask_n = row < rows, column < N
    begin = tl.program_id(2) * part
    end = tl.minimum(begin + part, K)
    x_rows = x_ptr + row * stride_x
    weight_rows = weight_ptr + column * stride_weight
    acc = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for start in range(begin, end, BLOCK_K):
        offs = start + tl.arange(0, BLOCK_K)
        mask_k = offs < end
        x = tl.load(x_rows[:, None] + offs[None, :], mask=mask_r[:, None] & mask_k[None, :], other=0.0)
        weight = tl.load(weight_rows[:, None] + offs[None, :], mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
    if ONE_PART and HAS_BIAS:
        acc += tl.load(bias_ptr + column, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + (tl.program_id(2).to(tl.int64) * rows + row)[:, None] * N + column[None, :]
    tl.store(out, acc, mask=mask_r[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["elements", "parts"])
def _add_parts_kernel(parts_ptr, bias_ptr, out_ptr, elements, parts, N, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """out [elements] = sum over parts [parts, elements], first to last, + bias of the element's column."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < elements
    total = tl.zeros([BLOCK], tl.float32)
    for p in range(parts):
        total += tl.load(parts_ptr + p * elements.to(tl.int64) + offs, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + offs % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, total, mask=mask)


def _blocks(itemsize: int) -> dict[str, int]:
    """fp32 has no tensor cores here: its products are multiply-adds, whose operands take registers."""
    return {"BLOCK_R": 16, "BLOCK_K": 32} if itemsize == 4 else {"BLOCK_R": 64, "BLOCK_K": 64}


def _launch_options(*tensors: Tensor) -> dict[str, int]:
    """Rows that do not begin at multiples of 16 elements are loaded through registers, of which more warps have more."""
    aligned = all(t.data_ptr() % 16 == 0 and t.stride(0) % 16 == 0 and t.shape[1] % 16 == 0 for t in tensors)
    return ALIGNED_LAUNCH if aligned else UNALIGNED_LAUNCH


def _part_size(columns: int, inner: int, block_k: int) -> int:
    """Elements of K that a program adds up: from the weights' shape alone."""
    wanted = triton.cdiv(ENOUGH_PROGRAMS, triton.cdiv(columns, BLOCK_N))
    part = max(LEAST_PART, triton.cdiv(inner, wanted))
    return triton.cdiv(part, block_k) * block_k


def batch_invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [rows, K] and weight [N, K] with last stride 1, contiguous bias [N], all of one type -> [rows, N] in it."""
    (rows, inner), columns = x.shape, len(weight)
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    blocks = _blocks(x.element_size())
    part = _part_size(columns, inner, blocks["BLOCK_K"])
    parts = max(1, triton.cdiv(inner, part))
    sums = out if parts == 1 else torch.empty((parts, rows, columns), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(columns, BLOCK_N), triton.cdiv(rows, blocks["BLOCK_R"]), parts)
    has_bias, bias_or_any = bias is not None, weight if bias is None else bias
    with torch.cuda.device_of(x):
        _batch_invariant_linear_kernel[grid](
            x,
            weight,
            bias_or_any,
            sums,
            rows,
            columns,
            inner,
            part,
            x.stride(0),
            weight.stride(0),
            HAS_BIAS=has_bias,
            ONE_PART=parts == 1,
            BLOCK_N=BLOCK_N,
            **blocks,
            **_launch_options(x, weight),
        )
        if parts > 1:
            _add_parts_kernel[(triton.cdiv(out.numel(), MERGE_BLOCK),)](
                sums,
                bias_or_any,
                out,
                out.numel(),
                parts,
                columns,
                HAS_BIAS=has_bias,
                BLOCK=MERGE_BLOCK,
                num_warps=MERGE_WARPS,
            )
    return out
