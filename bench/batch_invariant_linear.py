"""Cases of `batch_invariant_linear`: a decode step's products, against `F.linear`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastppo import ops
from fastppo.bench import floors
from fastppo.bench.harness import Case, Tensors
from fastppo.bench.setting import Setting
from fastppo.reference.batch_invariant_linear import batch_invariant_linear as reference

SIZES = ("rows", "columns", "inner")


def run_with(function):
    def run(x: Tensors) -> Tensors:
        with torch.no_grad():
            return {"out": function(x["x"], x["weight"])}

    return run


def make_case(rows: int, columns: int, inner: int) -> Case:
    def inputs(generator: torch.Generator) -> Tensors:
        shapes = {"x": (rows, inner), "weight": (columns, inner)}
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    return Case(
        op="batch_invariant_linear",
        name=f"[{rows}, {inner}] x [{columns}, {inner}]^T",
        inputs=inputs,
        providers={"fastppo": run_with(ops.batch_invariant_linear), "eager": run_with(F.linear)},
        exact=run_with(reference),
        work=floors.batch_invariant_linear(rows, columns, inner),
        largest=max(rows, columns) * max(columns, inner),
    )


def cases(setting: Setting) -> list[Case]:
    usual = [(4, 64, 32), (1, 64, 48)] if setting.quick else [(32, 4096, 256), (1, 4096, 1024)]
    return [make_case(*size) for size in setting.sizes or usual]
