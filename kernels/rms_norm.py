"""The RMS norm of rows [N, H] with the residual sum before it, forward and backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 4
WIDE_BLOCK = 4096  # from here on more warps, so that a row stays in registers
PARTS = 264  # two for each of an H200's multiprocessors: so many programs share the rows of a backward pass


@triton.jit
def inverse_rms(x, width, eps):
    """1 / rms(x), rms(x) = sqrt(mean(x^2) + eps) of a row's fp32 elements, 0 beyond its width."""
    return 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)


@triton.jit
def normed(x, factor, weight):
    """weight * (x * factor), the inner product rounded to x's type first: to none where that is fp32."""
    return (weight.to(tl.float32) * (x.to(tl.float32) * factor).to(x.dtype).to(tl.float32)).to(x.dtype)


@triton.jit
def _rms_norm_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    total_ptr,
    out_ptr,
    width,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    STEPWISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row of x [N, width]: total = x + residual, out = weight * total / rms(total) (arXiv:1910.07467, eq. 4).

    total may be x. STEPWISE: what the weight multiplies is rounded to x's type, as Transformers' modules do.
    """
    offs = tl.arange(0, BLOCK)
    mask = offs < width
    place = tl.program_id(0).to(tl.int64) * width + offs
    x = tl.load(x_ptr + place, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + place, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + place, x, mask=mask)
    wide = x.to(tl.float32)
    factor = inverse_rms(wide, width, eps)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0)
    tl.store(out_ptr + place, normed(x if STEPWISE else wide, factor, weight), mask=mask)


@triton.jit(do_not_specialize=["rows", "part_rows"])
def _rms_norm_backward_kernel(
    total_ptr,
    weight_ptr,
    d_out_ptr,
    d_total_ptr,
    d_x_ptr,
    parts_ptr,
    rows,
    width,
    part_rows,
    eps,
    HAS_D_TOTAL: tl.constexpr,
    WITH_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for `part_rows` rows of total, d_out, d_total and d_x [rows, width], one after another.

    With h = total / rms(total) and g = weight * d_out: d_x = (g - h mean(g h)) / rms(total), plus d_total. The rows' sum of d_out * h goes to
    parts fp32 [programs, width].
    """
    offs = tl.arange(0, BLOCK)
    mask = offs < width
    part = tl.program_id(0).to(tl.int64)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    d_weight = tl.zeros([BLOCK], tl.float32)
    for row in range(part * part_rows, tl.minimum((part + 1) * part_rows, rows)):
        place = row * width + offs
        x = tl.load(total_ptr + place, mask=mask, other=0.0).to(tl.float32)
        d_out = tl.load(d_out_ptr + place, mask=mask, other=0.0).to(tl.float32)
        factor = inverse_rms(x, width, eps)
        h = x * factor
        g = weight * d_out
        d_x = (g - h * (tl.sum(g * h, axis=0) / width)) * factor
        if HAS_D_TOTAL:
            d_x += tl.load(d_total_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if WITH_WEIGHT:
            d_weight += d_out * h
        tl.store(d_x_ptr + place, d_x, mask=mask)
    if WITH_WEIGHT:
        tl.store(parts_ptr + part * width + offs, d_weight, mask=mask)


def launch_options(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": NUM_WARPS if block < WIDE_BLOCK else 4 * NUM_WARPS}


def rms_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    in_place: bool = False,
    stepwise: bool = False,
) -> tuple[Tensor, Tensor]:
    """x and residual [N, H], weight [H], contiguous and of one type -> (normed, total), both in it.

    in_place: the total is written over x. stepwise: rounded where Transformers' modules round, not once.
    """
    out = torch.empty_like(x)
    total = x if in_place or residual is None else torch.empty_like(x)
    if x.numel():
        with torch.cuda.device_of(x):
            _rms_norm_forward_kernel[(len(x),)](
                x,
                x if residual is None else residual,
                weight,
                total,
                out,
                x.shape[1],
                eps,
                HAS_RESIDUAL=residual is not None,
                STEPWISE=stepwise,
                **launch_options(x.shape[1]),
            )
    return out, total


def rms_norm_backward(
    total: Tensor, weight: Tensor, d_out: Tensor, d_total: Tensor | None, eps: float, weight_wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x, in its type, and of weight, fp32: total, d_out and d_total [N, H] are contiguous. The sums follow from N and H alone."""
    rows, width = total.shape
    part_rows = max(1, triton.cdiv(rows, PARTS))
    programs = triton.cdiv(rows, part_rows)
    d_x = torch.empty_like(total)
    parts = torch.empty((programs if weight_wanted else 0, width), dtype=torch.float32, device=total.device)
    if rows:
        with torch.cuda.device_of(total):
            _rms_norm_backward_kernel[(programs,)](
                total,
                weight,
                d_out,
                total if d_total is None else d_total,
                d_x,
                parts,
                rows,
                width,
                part_rows,
                eps,
                HAS_D_TOTAL=d_total is not None,
                WITH_WEIGHT=weight_wanted,
                **launch_options(width),
            )
    return d_x, parts.sum(0) if weight_wanted else None
