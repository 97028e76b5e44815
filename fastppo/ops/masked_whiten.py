"""Statistics over the elements inside a mask: the mean, and whitening over the whole, possibly distributed, batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastppo.native import masked_whiten as native
from fastppo.ops import _checks
from fastppo.ops._backends import choose
from fastppo.ops._registry import custom_op, register_gradient
from fastppo.reference import masked_whiten as reference


def masked_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of the elements of `x` where `mask` is set; differentiable.

    Summed in float64 in an order that depends neither on threads nor on the instruction set. The gradient is 1 / n
    where the mask is set and exactly 0 elsewhere, whatever lies there.

    Args:
        x: [...] float32, bfloat16 or float16 (float64 runs in the reference).
        mask: bool of the same shape; None takes all.

    Returns:
        float32 0-d (float64 for float64); 0 for an empty mask.

    Raises:
        TypeError, ValueError: wrong type, shape or device.
    """
    return moments_inside(x, mask)[1].to(torch.float64 if x.dtype == torch.float64 else torch.float32)


@torch.no_grad()
def masked_whiten(
    x: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True, group: dist.ProcessGroup | None = None
) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) over the elements where `mask` is set, 0 elsewhere; not differentiable.

    variance = sum (x - mean)^2 / (n - 1) (Bessel's correction), 0 for n <= 1: as TRL and verl whiten, but an empty mask,
    a single element or equal elements give zeros, never NaN. Sums are float64 of deviations from the mean: a large mean
    costs no digits.

    Args:
        x: [...] float32, bfloat16 or float16 (float64 runs in the reference).
        mask: bool of the same shape; None takes all.
        shift_mean: False adds the mean back (whitened rewards keep theirs).
        group: process group whose members whiten together, each with its own part of the batch (any shapes): one gather
            of 24 bytes each. Every member gets the same bits of the statistics, which equal those of the whole batch in
            one process up to float64 rounding.

    Returns:
        float32 in the shape of `x` (float64 for float64).

    Raises:
        TypeError, ValueError: wrong type, shape or device.
    """
    moments = moments_inside(x, mask)
    if group is not None:
        moments = _merge_over_group(moments, group)
    return whitened(x, mask, moments, shift_mean)


def whitened(x: Tensor, mask: Tensor | None, moments: tuple[Tensor, Tensor, Tensor], shift_mean: bool) -> Tensor:
    """`masked_whiten` by the moments of other elements than those inside this mask: of more of them, or of fewer."""
    if choose("masked_whiten", x) == "reference":
        return reference.masked_whiten(x, mask, shift_mean=shift_mean, moments=moments)
    return _masked_whiten(x, mask, *moments, not shift_mean)


def moments_inside(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """fp64 0-d: count, mean, sum of squared deviations."""
    _checks.floating("x", x)
    if mask is not None:
        _checks.mask("mask", mask)
        _checks.shape("mask", mask, x.shape, "x's shape")
        _checks.same_device("mask", mask, "x", x)
    if choose("masked_whiten", x) == "reference":
        return reference.masked_moments(x, mask)
    return _masked_moments(x, mask)


def _merge_over_group(
    moments: tuple[Tensor, Tensor, Tensor], group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """The moments of all members' elements together (Chan, Golub and LeVeque 1979), added in the order of the ranks.

    Gathered rather than all-reduced: the order of additions, and so the bits, cannot depend on the collective's
    algorithm.
    """
    own = torch.stack(moments)
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    counts, means, squares = torch.stack(parts).unbind(1)
    count = counts.sum()
    mean = (counts * means).sum() / count.clamp_min(1)
    between = (counts * (means - mean).square()).sum()
    return count, mean, squares.sum() + between


@custom_op("masked_moments")
def _masked_moments(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return native.masked_moments(x, mask)


@torch.library.register_fake("fastppo::masked_moments")
def _(x, mask):
    return tuple(x.new_empty((), dtype=torch.float64) for _ in range(3))


def _setup_context(ctx, inputs, outputs) -> None:
    count, _, squares = outputs
    ctx.save_for_backward(inputs.mask, count)
    ctx.shape, ctx.dtype = inputs.x.shape, inputs.x.dtype
    ctx.mark_non_differentiable(count, squares)


def _backward(ctx, _, d_mean, __):
    mask, count = ctx.saved_tensors
    grad = (d_mean / count.clamp_min(1)).to(ctx.dtype).expand(ctx.shape)
    return (grad if mask is None else torch.where(mask, grad, 0),)


register_gradient(_masked_moments, ("x",), _setup_context, _backward, differentiable_backward=True)


@custom_op("masked_whiten")
def _masked_whiten(
    x: Tensor, mask: Tensor | None, count: Tensor, mean: Tensor, squares: Tensor, keep_mean: bool
) -> Tensor:
    return native.masked_whiten(x, mask, count, mean, squares, keep_mean)


@torch.library.register_fake("fastppo::masked_whiten")
def _(x, mask, count, mean, squares, keep_mean):
    return x.new_empty(x.shape, dtype=torch.float32)
