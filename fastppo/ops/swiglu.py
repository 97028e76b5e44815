"""The gate of a SwiGLU layer."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.native import flat_float
from fastppo.native import swiglu as native
from fastppo.ops import _checks
from fastppo.ops._backends import choose
from fastppo.ops._registry import custom_op, register_gradient
from fastppo.reference.swiglu import swiglu as reference


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up with silu(x) = x / (1 + exp(-x)) (Shazeer 2020, arXiv:2002.05202, eq. 5), elementwise.

    Args:
        gate, up: [...] of one shape and dtype: float32, bfloat16 or float16 (float64 runs in the reference); any strides.

    Returns:
        [...] in their dtype, as it stands inside a model: computed in fp32 and rounded once. Differentiable in both; the backward pass keeps
        nothing but gate and up. Second derivatives need float64.

    Raises:
        TypeError, ValueError: wrong type, shape or device.
    """
    _checks.floating("gate", gate)
    _checks.same_dtype("up", up, "gate", gate)
    _checks.shape("up", up, gate.shape, "gate's shape")
    _checks.same_device("up", up, "gate", gate)
    backend = choose("swiglu", gate)
    return reference(gate, up) if backend == "reference" else _swiglu(gate, up, backend)


@custom_op("swiglu")
def _swiglu(gate: Tensor, up: Tensor, backend: str) -> Tensor:
    if backend == "triton":
        from fastppo.kernels.swiglu import swiglu_forward

        gate = gate.contiguous()
        return swiglu_forward(gate, up.contiguous(), torch.empty_like(gate))
    return native.swiglu(flat_float(gate), flat_float(up)).to(gate.dtype)


@torch.library.register_fake("fastppo::swiglu")
def _(gate, up, backend):
    return gate.new_empty(gate.shape)


@custom_op("swiglu_backward")
def _swiglu_backward(gate: Tensor, up: Tensor, d_out: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    if backend == "triton":
        from fastppo.kernels.swiglu import swiglu_backward

        return swiglu_backward(gate.contiguous(), up.contiguous(), d_out.contiguous())
    d_gate, d_up, _ = native.swiglu_backward(*map(flat_float, (gate, up, d_out)), out_wanted=False)
    return d_gate.to(gate.dtype), d_up.to(gate.dtype)


@torch.library.register_fake("fastppo::swiglu_backward")
def _(gate, up, d_out, backend):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _setup_context(ctx, inputs, outputs) -> None:
    ctx.save_for_backward(inputs.gate, inputs.up)
    ctx.backend = inputs.backend


def _backward(ctx, d_out):
    return _swiglu_backward(*ctx.saved_tensors, d_out, ctx.backend)


register_gradient(_swiglu, ("gate", "up"), _setup_context, _backward)
