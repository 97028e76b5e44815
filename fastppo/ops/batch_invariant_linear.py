"""x W^T + b for the few rows of a decode step, with bits that do not depend on how many rows there are."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.native import batch_invariant_linear as native
from fastppo.ops import _checks
from fastppo.ops._backends import choose
from fastppo.ops._registry import custom_op
from fastppo.reference.batch_invariant_linear import batch_invariant_linear as reference


def batch_invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, each output one sum over K in a fixed order.

    A library's matrix product splits its sums by the number of rows, so a sequence's logits change in their last bits with the batch it
    is decoded in. Here they do not (on the fast backends; with AVX2 and AVX-512 alike). Meant for few rows: weights are read where they
    lie and never rearranged.

    Args:
        x: [..., K] float32, bfloat16 or float16 (float64 goes to the reference).
        weight: [N, K] in x's dtype. bias: [N] in x's dtype, or None.

    Returns:
        [..., N] in x's dtype, accumulated in fp32 and rounded once. Not differentiable.

    Raises:
        TypeError, ValueError: wrong type, shape or device.
    """
    _check_inputs(x, weight, bias)
    with torch.no_grad():
        backend = choose("batch_invariant_linear", x)
        if backend == "reference":
            return reference(x, weight, bias)
        return _batch_invariant_linear(x, weight, bias, backend)


def _check_inputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _checks.floating("x", x)
    if x.dim() < 1:
        raise ValueError(f"x has shape {list(x.shape)}, expected [..., K]")
    _checks.tensor("weight", weight)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [N, {x.shape[-1]}] (x's last dimension)")
    for name, operand in (("weight", weight), ("bias", bias)):
        if operand is None:
            continue
        _checks.same_dtype(name, operand, "x", x)
        _checks.same_device(name, operand, "x", x)
    if bias is not None:
        _checks.shape("bias", bias, weight.shape[:1], "weight's rows")


@custom_op("batch_invariant_linear")
def _batch_invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    if backend == "triton":
        from fastppo.kernels.batch_invariant_linear import batch_invariant_linear as kernel

        return kernel(x, weight, bias)
    return native.batch_invariant_linear(x, weight, bias)


@torch.library.register_fake("fastppo::batch_invariant_linear")
def _(x, weight, bias, backend):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
