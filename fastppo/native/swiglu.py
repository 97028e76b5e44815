"""Allocates the outputs of `swiglu` and calls the kernels. Everything is contiguous fp32, of one shape."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.native import _C, address, on_huge_pages, threads


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = on_huge_pages(torch.empty_like(gate))
    _C.swiglu(gate.data_ptr(), up.data_ptr(), gate.numel(), out.data_ptr(), threads())
    return out


def swiglu_backward(
    gate: Tensor, up: Tensor, d_out: Tensor, *, out_wanted: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of gate and up and, where it is wanted, what `swiglu` gave."""
    d_gate, d_up = on_huge_pages(torch.empty_like(gate)), on_huge_pages(torch.empty_like(up))
    out = on_huge_pages(torch.empty_like(gate)) if out_wanted else None
    inputs = gate.data_ptr(), up.data_ptr(), d_out.data_ptr()
    _C.swiglu_backward(*inputs, gate.numel(), d_gate.data_ptr(), d_up.data_ptr(), address(out), threads())
    return d_gate, d_up, out
