"""Case of `rms_norm`: the norm of a residual sum between two halves of a layer, of 2,048 tokens, on a GPU of 16,384 of a wider model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastppo import ops
from fastppo.bench import floors, peers
from fastppo.bench.harness import Case, Tensors
from fastppo.bench.setting import DTYPES, Setting, suffix
from fastppo.reference import rms_norm as reference

SIZES = ("N", "H")
USUAL = {"quick": (32, 48), "cpu": (2048, 1024), "cuda": (16384, 4096)}
TYPED = True
EPS = 1e-6
LEAVES = ("x", "weight", "residual")


def run_with(function):
    def run(x: Tensors) -> Tensors:
        normed, total = function(x["x"], x["weight"], eps=EPS, residual=x["residual"])
        leaves = [x[name] for name in LEAVES]
        gradients = torch.autograd.grad((normed, total), leaves, (x["d_normed"], x["d_total"]))
        named = zip((f"d_{name}" for name in LEAVES), gradients, strict=True)
        return {"normed": normed.detach(), "total": total.detach(), **dict(named)}

    return run


def eager(x: Tensor, weight: Tensor, *, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total


def make_case(tokens: int, width: int, device: str, dtype: str) -> Case:
    def inputs(generator: torch.Generator) -> Tensors:
        shapes = dict.fromkeys(("x", "residual", "d_normed", "d_total"), (tokens, width)) | {"weight": (width,)}
        made = {name: torch.randn(shape, generator=generator).to(DTYPES[dtype]) for name, shape in shapes.items()}
        return {name: x.requires_grad_(name in LEAVES) for name, x in made.items()}

    return Case(
        op="rms_norm",
        name=f"[{tokens}, {width}] with a residual{suffix(dtype)}, forward + backward",
        inputs=inputs,
        providers=peers.providers("rms_norm", run_with, ops.rms_norm, eager, device),
        exact=run_with(reference.rms_norm),
        work=floors.rms_norm(tokens, width, DTYPES[dtype].itemsize),
        largest=tokens * width,
        dtype=dtype,
    )


def cases(setting: Setting) -> list[Case]:
    sizes = setting.choose_sizes(USUAL)
    return [make_case(*size, setting.device, setting.choose_dtype()) for size in sizes]
