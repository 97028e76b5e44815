"""Case of `rotary_embedding`: the queries of 2,048 tokens, on a GPU of 16,384."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo import ops
from fastppo.bench import floors, peers
from fastppo.bench.harness import Case, Tensors
from fastppo.bench.setting import DTYPES, Setting, suffix
from fastppo.reference import rotary_embedding as reference

SIZES = ("N", "heads", "D")
USUAL = {"quick": (32, 3, 16), "cpu": (2048, 16, 64), "cuda": (16384, 32, 128)}
TYPED = True
PLACES = 1024


def run_with(function):
    def run(x: Tensors) -> Tensors:
        out = function(x["x"], x["cos"], x["sin"], x["positions"])
        (gradient,) = torch.autograd.grad(out, x["x"], x["d_out"])
        return {"out": out.detach(), "d_x": gradient}

    return run


def eager(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """As Transformers' Llama does, with the rows of its tables looked up."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[positions][:, None] + torch.cat([-second, first], dim=-1) * sin[positions][:, None]


def make_case(tokens: int, heads: int, head_size: int, device: str, dtype: str) -> Case:
    def inputs(generator: torch.Generator) -> Tensors:
        x, d_out = torch.randn(2, tokens, heads, head_size, generator=generator).to(DTYPES[dtype])
        angles = torch.rand(PLACES, head_size // 2, generator=generator).repeat(1, 2) * 6.28
        tables = {"cos": angles.cos().to(DTYPES[dtype]), "sin": angles.sin().to(DTYPES[dtype])}
        positions = torch.randint(PLACES, (tokens,), generator=generator)
        return {"x": x.clone().requires_grad_(), "d_out": d_out, "positions": positions} | tables

    return Case(
        op="rotary_embedding",
        name=f"[{tokens}, {heads}, {head_size}]{suffix(dtype)}, forward + backward",
        inputs=inputs,
        providers=peers.providers("rotary_embedding", run_with, ops.rotary_embedding, eager, device),
        exact=run_with(reference.rotary_embedding),
        work=floors.rotary_embedding(tokens, heads, head_size, PLACES, DTYPES[dtype].itemsize),
        largest=tokens * heads * head_size,
        dtype=dtype,
    )


def cases(setting: Setting) -> list[Case]:
    sizes = setting.choose_sizes(USUAL)
    return [make_case(*size, setting.device, setting.choose_dtype()) for size in sizes]
