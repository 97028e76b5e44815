"""Case of `swiglu`: the gate of 2,048 tokens, on a GPU of 16,384 of a wider model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastppo import ops
from fastppo.bench import floors, peers
from fastppo.bench.harness import Case, Tensors
from fastppo.bench.setting import DTYPES, Setting, suffix
from fastppo.reference import swiglu as reference

SIZES = ("N", "I")
USUAL = {"quick": (32, 48), "cpu": (2048, 2816), "cuda": (16384, 11008)}
TYPED = True


def run_with(function):
    def run(x: Tensors) -> Tensors:
        out = function(x["gate"], x["up"])
        d_gate, d_up = torch.autograd.grad(out, (x["gate"], x["up"]), x["d_out"])
        return {"out": out.detach(), "d_gate": d_gate, "d_up": d_up}

    return run


def eager(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def make_case(tokens: int, width: int, device: str, dtype: str) -> Case:
    def inputs(generator: torch.Generator) -> Tensors:
        gate, up, d_out = torch.randn(3, tokens, width, generator=generator).to(DTYPES[dtype])
        return {"gate": gate.clone().requires_grad_(), "up": up.clone().requires_grad_(), "d_out": d_out}

    return Case(
        op="swiglu",
        name=f"[{tokens}, {width}]{suffix(dtype)}, forward + backward",
        inputs=inputs,
        providers=peers.providers("swiglu", run_with, ops.swiglu, eager, device),
        exact=run_with(reference.swiglu),
        work=floors.swiglu(tokens * width, DTYPES[dtype].itemsize),
        largest=tokens * width,
        dtype=dtype,
    )


def cases(setting: Setting) -> list[Case]:
    sizes = setting.choose_sizes(USUAL)
    return [make_case(*size, setting.device, setting.choose_dtype()) for size in sizes]
