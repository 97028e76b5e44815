"""x W^T + b whose bits do not depend on how many rows x has.

Rows, columns and K are cut into tiles of fixed sizes, and K into splits that follow from the weight's shape alone; a split's tiles are summed in
order, then the splits in order. A row is the same sum of the same products wherever it stands and whatever stands beside it.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 64
NUM_WARPS = 4
PROGRAMS = 264  # two for each of an H200's multiprocessors: fewer column tiles than these are multiplied in splits of K
LEAST_SPLIT = 256  # products of one split: fewer would not outweigh writing its sums and reading them again
MERGE_BLOCK = 1024


@triton.jit(do_not_specialize=["rows", "row_tiles", "split_tiles"])
def _batch_invariant_linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    rows,
    N,
    K,
    row_tiles,
    split_tiles,
    stride_weight,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program for BLOCK_ROWS rows, BLOCK_N columns and `split_tiles` tiles of K. x [rows, K], weight [N, K], bias [N], out [splits, rows, N]."""
    # Row tiles vary fastest: programs that run together read the same weights, once from memory and then from the cache.
    row = (tl.program_id(0) % row_tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (tl.program_id(0) // row_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(1) * split_tiles * BLOCK_K  # Triton knows that it is a multiple of 16
    end = tl.minimum(K, begin + split_tiles * BLOCK_K)
    mask_row, mask_column = row < rows, column < N
    offs_k = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + row * K
    weight_rows = weight_ptr + tl.minimum(column, N - 1) * stride_weight  # columns beyond N are not stored
    acc = tl.zeros([BLOCK_ROWS, BLOCK_N], tl.float32)
    for start in range(begin, end, BLOCK_K):
        k = start + offs_k
        mask_k = (k < K)[None, :]  # K and not `end`, which is it or the border of a tile: Triton knows how K divides
        x = tl.load(x_rows[:, None] + k[None, :], mask=mask_row[:, None] & mask_k, other=0.0)  # [BLOCK_ROWS, BLOCK_K]
        w = tl.load(weight_rows[:, None] + k[None, :], mask=mask_k, other=0.0)  # [BLOCK_N, BLOCK_K]
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + column, mask=mask_column, other=0.0).to(tl.float32)[None, :]
    place = (split * rows + row)[:, None] * N + column[None, :]
    tl.store(out_ptr + place, acc, mask=mask_row[:, None] & mask_column[None, :])


@triton.jit(do_not_specialize=["elements", "splits"])
def _add_splits_kernel(
    parts_ptr,
    bias_ptr,
    out_ptr,
    elements,
    N,
    splits,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for BLOCK elements of out [rows * N]: the sum of parts fp32 [splits, rows * N], first split first, and bias [N]."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < elements
    acc = tl.zeros([BLOCK], tl.float32)
    part = parts_ptr + offs
    for _ in range(splits):
        acc += tl.load(part, mask=mask, other=0.0)
        part += elements
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, acc, mask=mask)


def _tile(weight: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """Block sizes, and the options of the launch: from the weight alone.

    64 rows fill an instruction of Hopper's tensor cores and still take less time than reading their weights. fp32 has no tensor cores:
    its products are fused multiply-adds, whose operands take registers. So do weights that Triton cannot tell to lie at multiples of 16
    bytes, which cannot go to shared memory directly.
    """
    if weight.dtype == torch.float32:
        return {"BLOCK_ROWS": 16, "BLOCK_K": 16}, {"num_warps": NUM_WARPS, "num_stages": 4}
    if weight.data_ptr() % 16 == 0 and weight.stride(0) % 16 == 0 and weight.shape[1] % 16 == 0:
        return {"BLOCK_ROWS": 64, "BLOCK_K": 64}, {"num_warps": NUM_WARPS, "num_stages": 4}
    return {"BLOCK_ROWS": 64, "BLOCK_K": 32}, {"num_warps": 2 * NUM_WARPS, "num_stages": 2}


def _split(columns: int, inner: int, block_k: int) -> tuple[int, int]:
    """(splits of K, tiles of each), from the weight's shape alone."""
    tiles = triton.cdiv(inner, block_k)
    wanted = max(1, min(PROGRAMS // triton.cdiv(columns, BLOCK_N), inner // LEAST_SPLIT))
    split_tiles = max(1, triton.cdiv(tiles, wanted))
    return max(1, triton.cdiv(tiles, split_tiles)), split_tiles


def _as_rows(x: Tensor) -> Tensor:
    """`x` [..., K] as [rows, K], contiguous and aligned to 16 bytes, so that one compiled kernel serves every number of rows."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def batch_invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x [..., K], weight [N, K] with last stride 1 in x's dtype, contiguous bias [N] -> [..., N], accumulated in fp32, rounded once.

    out: where it goes, contiguous; its dtype, x's or fp32, is what is rounded to.
    """
    columns, inner = weight.shape
    if out is None:
        out = torch.empty((*x.shape[:-1], columns), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x = _as_rows(x)
    rows = x.shape[0]
    tile, options = _tile(weight)
    splits, split_tiles = _split(columns, inner, tile["BLOCK_K"])
    parts = out if splits == 1 else torch.empty((splits, rows, columns), dtype=torch.float32, device=x.device)
    row_tiles = triton.cdiv(rows, tile["BLOCK_ROWS"])
    addend = x if bias is None else bias
    with torch.cuda.device_of(x):
        _batch_invariant_linear_kernel[(row_tiles * triton.cdiv(columns, BLOCK_N), splits)](
            x,
            weight,
            addend,
            parts,
            rows,
            columns,
            inner,
            row_tiles,
            split_tiles,
            weight.stride(0),
            HAS_BIAS=bias is not None and splits == 1,
            BLOCK_N=BLOCK_N,
            **tile,
            **options,
        )
        if splits > 1:
            _add_splits_kernel[(triton.cdiv(out.numel(), MERGE_BLOCK),)](
                parts,
                addend,
                out,
                out.numel(),
                columns,
                splits,
                HAS_BIAS=bias is not None,
                BLOCK=MERGE_BLOCK,
                num_warps=NUM_WARPS,
            )
    return out
