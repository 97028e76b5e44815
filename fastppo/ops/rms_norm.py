"""The RMS norm of rows, with the residual sum before it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.native import rms_norm as native
from fastppo.ops import _checks
from fastppo.ops._backends import choose
from fastppo.ops._registry import custom_op, register_gradient
from fastppo.reference.rms_norm import rms_norm as reference

MAX_TRITON_WIDTH = 8192  # of which a program holds a row, its gradient and the weight's in registers


class RmsNorm(NamedTuple):
    normed: Tensor
    total: Tensor


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None) -> Tensor | RmsNorm:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4).

    With a residual, y is the norm of total = x + residual as it is returned, rounded to x's type: what a layer passes on beside its norm.

    Args:
        x: [..., H] float32, bfloat16 or float16 (float64 runs in the reference, as do rows of more than 8192 on a GPU); any strides.
        weight: [H] in x's dtype.
        eps: >= 0, added to the mean of squares.
        residual: x's shape and dtype, or None.

    Returns:
        y [..., H], or with a residual `RmsNorm(normed, total)`. They stand inside a model and have x's dtype: computed in fp32 and rounded once.
        Differentiable in x, residual and weight; the weight's gradient is summed over the rows in a fixed order. A NaN in a row stays in that
        row's results. Second derivatives need float64.

    Raises:
        TypeError, ValueError: wrong type, shape, device or range.
    """
    _check_inputs(x, weight, residual)
    eps = _checks.number("eps", eps, at_least=0)
    backend = choose("rms_norm", x)
    if backend == "reference" or (backend == "triton" and x.shape[-1] > MAX_TRITON_WIDTH):
        found = reference(x, weight, eps=eps, residual=residual)
        return found if residual is None else RmsNorm(*found)
    normed, total = _rms_norm(x, residual, weight, eps, backend)
    return normed if residual is None else RmsNorm(normed, total)


def _check_inputs(x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    _checks.floating("x", x)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x has shape {list(x.shape)}, expected [..., H] with H >= 1")
    for name, other in (("weight", weight), ("residual", x if residual is None else residual)):
        _checks.same_dtype(name, other, "x", x)
        _checks.same_device(name, other, "x", x)
    _checks.shape("weight", weight, x.shape[-1:], "x's last dimension")
    if residual is not None:
        _checks.shape("residual", residual, x.shape, "x's shape")


def _as_rows(x: Tensor | None, like: Tensor) -> Tensor | None:
    return None if x is None else x.contiguous().view(-1, like.shape[-1])


def _forward_on_cpu(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(normed, total) of rows; the kernel takes fp32, so a total of halves is rounded before it."""
    if residual is not None and x.dtype != torch.float32:
        total = x + residual
        return _forward_on_cpu(total, None, weight, eps)[0], total
    total, normed = native.rms_norm(x.float(), weight.float(), eps, residual)
    return normed.to(x.dtype), total


def _backward_on_cpu(
    total: Tensor, weight: Tensor, d_normed: Tensor, d_total: Tensor | None, eps: float, weight_wanted: bool
) -> tuple[Tensor, Tensor | None]:
    wide = None if d_total is None else d_total.float()
    d_x, d_weight = native.rms_norm_backward(total.float(), weight.float(), eps, d_normed.float(), wide, weight_wanted)
    return d_x.to(total.dtype), d_weight


@custom_op("rms_norm")
def _rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    """(normed, total); the total is empty where it would be x itself."""
    if backend == "triton":
        from fastppo.kernels.rms_norm import rms_norm_forward as forward
    else:
        forward = _forward_on_cpu
    normed, total = forward(_as_rows(x, x), _as_rows(residual, x), weight.contiguous(), eps)
    return normed.view(x.shape), x.new_empty(0) if residual is None else total.view(x.shape)


@torch.library.register_fake("fastppo::rms_norm")
def _(x, residual, weight, eps, backend):
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)


@custom_op("rms_norm_backward")
def _rms_norm_backward(
    total: Tensor,
    weight: Tensor,
    d_normed: Tensor,
    d_total: Tensor | None,
    eps: float,
    weight_wanted: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of x, which is the residual's too, and of weight, empty where it is not wanted."""
    if backend == "triton":
        from fastppo.kernels.rms_norm import rms_norm_backward as backward
    else:
        backward = _backward_on_cpu
    rows, d_rows, d_total_rows = (_as_rows(x, total) for x in (total, d_normed, d_total))
    d_x, d_weight = backward(rows, weight.contiguous(), d_rows, d_total_rows, eps, weight_wanted)
    return d_x.view(total.shape), d_weight.to(weight.dtype) if weight_wanted else weight.new_empty(0)


@torch.library.register_fake("fastppo::rms_norm_backward")
def _(total, weight, d_normed, d_total, eps, weight_wanted, backend):
    return total.new_empty(total.shape), weight.new_empty(weight.shape if weight_wanted else 0)


def _setup_context(ctx, inputs, outputs) -> None:
    _, total = outputs
    ctx.save_for_backward(inputs.x if inputs.residual is None else total, inputs.weight)
    ctx.options = inputs.eps, inputs.backend
    if inputs.residual is None:
        ctx.mark_non_differentiable(total)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_normed, d_total):
    total, weight = ctx.saved_tensors
    (eps, backend), (x_wanted, residual_wanted, weight_wanted) = ctx.options, ctx.wanted
    if d_normed is None:
        d_normed = torch.zeros_like(total)
    d_x, d_weight = _rms_norm_backward(total, weight, d_normed, d_total, eps, weight_wanted, backend)
    return d_x if x_wanted else None, d_x if residual_wanted else None, d_weight if weight_wanted else None


register_gradient(_rms_norm, ("x", "residual", "weight"), _setup_context, _backward)
