"""The gate of a SwiGLU layer, silu(gate) * up with silu(x) = x / (1 + exp(-x)) (arXiv:2002.05202, eq. 5), forward and backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def _swiglu_forward_kernel(gate_ptr, up_ptr, out_ptr, elements, STEPWISE: tl.constexpr, BLOCK: tl.constexpr):
    """One program for BLOCK elements; out may be gate. STEPWISE: silu is rounded to gate's type, as Transformers' modules do."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < elements
    gate = tl.load(gate_ptr + place, mask=mask, other=0.0)
    up = tl.load(up_ptr + place, mask=mask, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    silu = wide / (1.0 + tl.exp(-wide))
    if STEPWISE:
        silu = silu.to(gate.dtype).to(tl.float32)
    tl.store(out_ptr + place, silu * up, mask=mask)


@triton.jit
def _swiglu_backward_kernel(gate_ptr, up_ptr, d_out_ptr, d_gate_ptr, d_up_ptr, elements, BLOCK: tl.constexpr):
    """silu'(x) = s + x s (1 - s) with s = sigmoid(x)."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < elements
    gate = tl.load(gate_ptr + place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + place, mask=mask, other=0.0).to(tl.float32)
    d_out = tl.load(d_out_ptr + place, mask=mask, other=0.0).to(tl.float32)
    denominator = 1.0 + tl.exp(-gate)
    sigmoid, silu = 1.0 / denominator, gate / denominator
    tl.store(d_gate_ptr + place, d_out * up * (sigmoid + silu * (1.0 - sigmoid)), mask=mask)
    tl.store(d_up_ptr + place, d_out * silu, mask=mask)


def swiglu_forward(gate: Tensor, up: Tensor, out: Tensor, *, stepwise: bool = False) -> Tensor:
    """Writes into `out`, which may be gate, and returns it; all contiguous, of one shape and type.

    stepwise: rounded where Transformers' modules round, not once.
    """
    if gate.numel():
        with torch.cuda.device_of(gate):
            _swiglu_forward_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
                gate, up, out, gate.numel(), STEPWISE=stepwise, BLOCK=BLOCK, num_warps=NUM_WARPS
            )
    return out


def swiglu_backward(gate: Tensor, up: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up; all contiguous, of one shape and type."""
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    if gate.numel():
        with torch.cuda.device_of(gate):
            _swiglu_backward_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
                gate, up, d_out, d_gate, d_up, gate.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS
            )
    return d_gate, d_up
