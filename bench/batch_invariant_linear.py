"""Cases of `batch_invariant_linear`: a decode step's products, against `F.linear`; on a GPU those of a model with 2 B and with 7 B parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastppo import ops
from fastppo.bench import floors
from fastppo.bench.harness import Case, Tensors
from fastppo.bench.setting import DTYPES, Setting, suffix
from fastppo.reference.batch_invariant_linear import batch_invariant_linear as reference

SIZES = ("rows", "columns", "inner")
TYPED = True
USUAL = {
    "quick": [(4, 64, 32), (1, 64, 48)],
    "cpu": [(32, 4096, 256), (1, 4096, 1024)],
    "cuda": [(256, 2048, 6144), (64, 18944, 3584)],
}


def run_with(function):
    def run(x: Tensors) -> Tensors:
        with torch.no_grad():
            return {"out": function(x["x"], x["weight"])}

    return run


def make_case(rows: int, columns: int, inner: int, dtype: str) -> Case:
    def inputs(generator: torch.Generator) -> Tensors:
        shapes = {"x": (rows, inner), "weight": (columns, inner)}
        return {name: torch.randn(shape, generator=generator).to(DTYPES[dtype]) for name, shape in shapes.items()}

    return Case(
        op="batch_invariant_linear",
        name=f"[{rows}, {inner}] x [{columns}, {inner}]^T{suffix(dtype)}",
        inputs=inputs,
        providers={"fastppo": run_with(ops.batch_invariant_linear), "eager": run_with(F.linear)},
        exact=run_with(reference),
        work=floors.batch_invariant_linear(rows, columns, inner, DTYPES[dtype].itemsize),
        largest=max(rows, columns) * max(columns, inner),
        dtype=dtype,
    )


def cases(setting: Setting) -> list[Case]:
    sizes = setting.sizes or USUAL["quick" if setting.quick else setting.device]
    return [make_case(*size, setting.choose_dtype()) for size in sizes]
