"""Log-probability of each label and entropy of each row from logits [outer, inner, V], forward and backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._online_softmax import log1p, one_minus_exp, online_update, transform_logits, transform_slope

BLOCK_V = 4096  # elements of a row that one program holds at once
NUM_WARPS = 8


@triton.jit
def add_row(
    row_ptr,
    V,
    running_max,
    rest,
    weighted,
    scale,
    softcap,
    temperature,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Folds a row x [V], or the next piece of one, into (max, sum exp(z - max) - 1, sum exp(z - max) (z - max))."""
    for start in range(0, V, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        x = tl.load(row_ptr + offs_v, mask=mask_v, other=0.0, eviction_policy="evict_first")  # [BLOCK_V]
        z = tl.where(mask_v, transform_logits(x, scale, softcap, temperature, HAS_SOFTCAP), -float("inf"))
        running_max, rest, weighted = online_update(z, running_max, rest, weighted, WITH_ENTROPY)
    return running_max, rest, weighted


@triton.jit
def _token_logprobs_forward_kernel(
    logits_ptr,
    labels_ptr,
    logprobs_ptr,
    entropy_ptr,
    max_logsum_ptr,
    inner,
    V,
    stride_outer,
    stride_inner,
    scale,
    softcap,
    temperature,
    ignore_index,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program a row. logits [outer, inner, V]; labels, logprobs, entropy [outer * inner]; max_logsum [outer * inner, 2]."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + (row // inner) * stride_outer + (row % inner) * stride_inner
    label = tl.load(labels_ptr + row)
    if label == ignore_index:  # the row is not read
        tl.store(logprobs_ptr + row, 0.0)
        tl.store(max_logsum_ptr + 2 * row, 0.0)
        tl.store(max_logsum_ptr + 2 * row + 1, 0.0)
        if WITH_ENTROPY:
            tl.store(entropy_ptr + row, 0.0)
        return
    zero = tl.full(
        (), 0.0, tl.float32
    )  # a number written here would be a constant to add_row, and could not change in its loop
    running_max, rest, weighted = add_row(
        row_ptr,
        V,
        zero - float("inf"),
        zero - 1.0,
        zero,
        scale,
        softcap,
        temperature,
        HAS_SOFTCAP,
        WITH_ENTROPY,
        BLOCK_V,
    )
    # As in torch: a +inf, or nothing but -inf, leaves no distribution; NaN is in the sums already.
    no_distribution = (running_max == float("inf")) | (running_max == -float("inf"))
    log_sum = tl.where(no_distribution, float("nan"), log1p(rest))
    in_range = (label >= 0) & (label < V)
    x_label = tl.load(row_ptr + label, mask=in_range, other=float("nan"))  # out of range: NaN, and no read outside
    z_label = transform_logits(x_label, scale, softcap, temperature, HAS_SOFTCAP)
    tl.store(logprobs_ptr + row, (z_label - running_max) - log_sum)
    tl.store(max_logsum_ptr + 2 * row, running_max)
    tl.store(max_logsum_ptr + 2 * row + 1, log_sum)
    if WITH_ENTROPY:
        tl.store(entropy_ptr + row, log_sum - weighted / (1.0 + rest))


@triton.jit
def _token_logprobs_add_tile_kernel(
    tile_ptr,
    labels_ptr,
    state_ptr,
    width,
    stride_row,
    scale,
    softcap,
    temperature,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program a row. tile [rows, width]; labels [rows]; state fp64 [rows, 4]: max, sum - 1, weighted sum, label's z."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = tile_ptr + row * stride_row
    sums_ptr = state_ptr + 4 * row
    running_max = tl.load(sums_ptr).to(tl.float32)
    rest = tl.load(sums_ptr + 1).to(tl.float32)
    weighted = tl.load(sums_ptr + 2).to(tl.float32)
    running_max, rest, weighted = add_row(
        row_ptr, width, running_max, rest, weighted, scale, softcap, temperature, HAS_SOFTCAP, WITH_ENTROPY, BLOCK_V
    )
    label = tl.load(labels_ptr + row)
    here = (label >= 0) & (label < width)
    x_label = tl.load(row_ptr + label, mask=here, other=0.0)
    tl.store(sums_ptr, running_max)
    tl.store(sums_ptr + 1, rest)
    tl.store(sums_ptr + 2, weighted)
    tl.store(sums_ptr + 3, transform_logits(x_label, scale, softcap, temperature, HAS_SOFTCAP), mask=here)


@triton.jit
def _token_logprobs_backward_kernel(
    logits_ptr,
    labels_ptr,
    max_logsum_ptr,
    entropy_ptr,
    d_logprobs_ptr,
    d_entropy_ptr,
    grad_ptr,
    inner,
    V,
    stride_outer,
    stride_inner,
    grad_stride_outer,
    grad_stride_inner,
    scale,
    softcap,
    temperature,
    ignore_index,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program for BLOCK_V elements of one row; each element is read before it is written, so grad may be the logits."""
    row = tl.program_id(0).to(tl.int64)
    first_v = tl.program_id(1) * BLOCK_V
    offs_v = first_v + tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    grad_row_ptr = grad_ptr + (row // inner) * grad_stride_outer + (row % inner) * grad_stride_inner
    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        tl.store(grad_row_ptr + offs_v, tl.zeros([BLOCK_V], tl.float32), mask=mask_v)
        return
    row_ptr = logits_ptr + (row // inner) * stride_outer + (row % inner) * stride_inner
    x = tl.load(row_ptr + offs_v, mask=mask_v, other=0.0, eviction_policy="evict_first")
    row_max = tl.load(max_logsum_ptr + 2 * row)
    log_sum = tl.load(max_logsum_ptr + 2 * row + 1)
    d_logprob = tl.load(d_logprobs_ptr + row)
    log_p = (transform_logits(x, scale, softcap, temperature, HAS_SOFTCAP) - row_max) - log_sum
    p = tl.exp(log_p)
    # d logprob / dz = onehot - p
    dz = -d_logprob * p
    if (label >= first_v) & (label < first_v + BLOCK_V):
        dz = tl.where(offs_v == label, d_logprob * one_minus_exp(log_p), dz)
    if WITH_ENTROPY:
        # d H / dz = -p (log p + H); p = 0 contributes 0 though log p is -inf
        entropy = tl.load(entropy_ptr + row)
        d_entropy = tl.load(d_entropy_ptr + row)
        dz -= tl.where(p == 0.0, 0.0, d_entropy * p * (log_p + entropy))
    slope = transform_slope(x, scale, softcap, temperature, HAS_SOFTCAP)
    grad = tl.where(dz == 0.0, 0.0, dz * slope)  # where dz is 0 the slope may be NaN
    tl.store(grad_row_ptr + offs_v, grad, mask=mask_v)


def _block(V: int) -> int:
    return min(BLOCK_V, triton.next_power_of_2(V))


def token_logprobs_forward(
    logits: Tensor, labels: Tensor, ignore_index: int, transform: tuple[float, float, float], with_entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """logits [outer, inner, V] with last stride 1, labels int64 [outer * inner] contiguous.

    transform: (scale, softcap or 0, temperature). Returns fp32 logprobs, entropy (or None) and (max, log-sum) [outer * inner, 2].
    """
    outer, inner, V = logits.shape
    logprobs = torch.empty(outer * inner, dtype=torch.float32, device=logits.device)
    entropy = torch.empty_like(logprobs) if with_entropy else None
    max_logsum = torch.empty((outer * inner, 2), dtype=torch.float32, device=logits.device)
    scale, softcap, temperature = transform
    if outer * inner:
        _token_logprobs_forward_kernel[(outer * inner,)](
            logits,
            labels,
            logprobs,
            entropy if with_entropy else logprobs,
            max_logsum,
            inner,
            V,
            logits.stride(0),
            logits.stride(1),
            scale,
            softcap,
            temperature,
            ignore_index,
            HAS_SOFTCAP=softcap > 0,
            WITH_ENTROPY=with_entropy,
            BLOCK_V=_block(V),
            num_warps=NUM_WARPS,
        )
    return logprobs, entropy, max_logsum


def token_logprobs_add_tile(
    tile: Tensor, labels: Tensor, transform: tuple[float, float, float], with_entropy: bool, state: Tensor
) -> None:
    """Adds columns [rows, width] to `state`, fp64 [rows, 4]: max z, sum exp(z - max) - 1, sum exp(z - max) (z - max), label's z.

    labels int64 [rows] count from the tile's first column; one outside it leaves the label's z as it is. The tile's last
    stride is 1, all else is contiguous; `state` starts as (-inf, -1, 0, NaN).
    """
    count, width = tile.shape
    scale, softcap, temperature = transform
    if count:
        _token_logprobs_add_tile_kernel[(count,)](
            tile,
            labels,
            state,
            width,
            tile.stride(0),
            scale,
            softcap,
            temperature,
            HAS_SOFTCAP=softcap > 0,
            WITH_ENTROPY=with_entropy,
            BLOCK_V=_block(width),
            num_warps=NUM_WARPS,
        )


def token_logprobs_backward(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    transform: tuple[float, float, float],
    max_logsum: Tensor,
    entropy: Tensor | None,
    d_logprobs: Tensor,
    d_entropy: Tensor | None,
    grad: Tensor,
) -> None:
    """Writes the gradient of logits [outer, inner, V] into `grad`, of that shape and any type; it may be `logits` itself.

    A label outside [0, V) that is not `ignore_index` stands in columns that these logits do not hold.
    """
    outer, inner, V = logits.shape
    scale, softcap, temperature = transform
    if not outer * inner:
        return
    block = _block(V)
    with_entropy = d_entropy is not None
    _token_logprobs_backward_kernel[(outer * inner, triton.cdiv(V, block))](
        logits,
        labels,
        max_logsum,
        entropy if with_entropy else max_logsum,
        d_logprobs,
        d_entropy if with_entropy else d_logprobs,
        grad,
        inner,
        V,
        logits.stride(0),
        logits.stride(1),
        grad.stride(0),
        grad.stride(1),
        scale,
        softcap,
        temperature,
        ignore_index,
        HAS_SOFTCAP=softcap > 0,
        WITH_ENTROPY=with_entropy,
        BLOCK_V=block,
        num_warps=NUM_WARPS,
    )
