"""The rotary embedding of heads at their positions."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.native import flat_float
from fastppo.native import rotary_embedding as native
from fastppo.ops import _checks
from fastppo.ops._backends import choose
from fastppo.ops._registry import custom_op, register_gradient
from fastppo.reference.rotary_embedding import rotary_embedding as reference


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """The first R elements of each head turned by its token's angles (Su et al. 2021, arXiv:2104.09864, eq. 34).

    A pair is element i of the first half of those R and element i of the second, as in Transformers' Llama:

        first' = first cos - second sin,   second' = second cos + first sin

    Args:
        x: [N, heads, D] float32, bfloat16 or float16 (float64 runs in the reference); any strides, read where it lies if each token's heads
            are contiguous.
        cos, sin: [P, R], R <= D even; of any of these types. The angles' cosines and sines at each position.
        positions: int64 or int32 [N], in [0, P).

    Returns:
        [N, heads, D] in x's dtype, as it stands inside a model: computed in fp32 and rounded once. Elements from R on are x's. Differentiable in x
        alone, any number of times: cos and sin count as constants. A NaN stays in its pair.

    Raises:
        TypeError, ValueError: wrong type, shape or device, or (on the CPU) a position out of range; on a GPU, where the host does not wait, what
            that token's turn would be is NaN, and nothing outside the tables is read.
    """
    _check_inputs(x, cos, sin, positions)
    cos, sin = cos.detach(), sin.detach()
    backend = choose("rotary_embedding", x, cos, sin)
    if backend == "reference":
        if not torch.compiler.is_compiling():  # which cannot look at values
            _refuse_outside(positions, len(cos))
        return reference(x, cos, sin, positions)
    return _rotary_embedding(x, cos, sin, positions, False, backend)


def _check_inputs(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    _checks.floating("x", x)
    if x.dim() != 3:
        raise ValueError(f"x has shape {list(x.shape)}, expected [N, heads, D]")
    _checks.floating("cos", cos)
    _checks.floating("sin", sin)
    head_size = x.shape[-1]
    if cos.dim() != 2 or len(cos) < 1 or cos.shape[1] % 2 or not 0 < cos.shape[1] <= head_size:
        raise ValueError(
            f"cos has shape {list(cos.shape)}, expected [P, R] with P >= 1 and R even, from 2 to {head_size}"
        )
    _checks.shape("sin", sin, cos.shape, "cos' shape")
    _checks.integer("positions", positions)
    _checks.shape("positions", positions, x.shape[:1], "x's tokens")
    for name, other in (("cos", cos), ("sin", sin), ("positions", positions)):
        _checks.same_device(name, other, "x", x)


def _refuse_outside(positions: Tensor, count: int) -> None:
    if positions.device.type == "cpu" and len(positions):
        for position in positions.aminmax():
            if not 0 <= position < count:
                bad = positions.tolist().index(position)
                raise ValueError(
                    f"positions holds {position.item()} at {bad}, expected numbers from 0 to {count - 1} (cos' rows)"
                )


@custom_op("rotary_embedding")
def _rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, backward: bool, backend: str) -> Tensor:
    """x turned or, `backward`, turned back by the transposed rotation: the gradient of what was turned."""
    x = x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()
    positions = positions.contiguous()
    if backend == "triton":
        from fastppo.kernels.rotary_embedding import rotary_embedding as kernel

        return kernel(x, cos.contiguous(), sin.contiguous(), positions, backward=backward)
    _refuse_outside(positions, len(cos))
    wide = x if x.dtype == torch.float32 else flat_float(x)
    out = native.rotary_embedding(wide, flat_float(cos), flat_float(sin), positions.long(), backward=backward)
    return out.to(x.dtype)


@torch.library.register_fake("fastppo::rotary_embedding")
def _(x, cos, sin, positions, backward, backend):
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, outputs) -> None:
    ctx.save_for_backward(inputs.cos, inputs.sin, inputs.positions)
    ctx.options = inputs.backward, inputs.backend


def _backward(ctx, d_out):
    backward, backend = ctx.options
    return (_rotary_embedding(d_out, *ctx.saved_tensors, not backward, backend),)


register_gradient(_rotary_embedding, ("x",), _setup_context, _backward, differentiable_backward=True)
