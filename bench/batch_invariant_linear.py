"""Cases of `batch_invariant_linear`: a decode step's products, on a GPU those of a large model in bf16, against `F.linear`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastppo import ops
from fastppo.bench import floors
from fastppo.bench.harness import Case, Tensors
from fastppo.reference.batch_invariant_linear import batch_invariant_linear as reference


def run_with(function):
    def run(x: Tensors) -> Tensors:
        with torch.no_grad():
            return {"out": function(x["x"], x["weight"])}

    return run


def cases(quick: bool, device: str = "cpu") -> list[Case]:
    on_gpu = device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32

    def case(rows: int, columns: int, inner: int) -> Case:
        def inputs(generator: torch.Generator) -> Tensors:
            shapes = {"x": (rows, inner), "weight": (columns, inner)}
            return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}

        return Case(
            op="batch_invariant_linear",
            name=f"[{rows}, {inner}] x [{columns}, {inner}]^T{', bf16' if on_gpu else ''}",
            inputs=inputs,
            providers={"fastppo": run_with(ops.batch_invariant_linear), "eager": run_with(F.linear)},
            exact=run_with(reference),
            work=floors.batch_invariant_linear(rows, columns, inner, dtype.itemsize),
        )

    if quick:
        return [case(4, 64, 32), case(1, 64, 48)]
    return [case(32, 4096, 4096), case(1, 4096, 4096)] if on_gpu else [case(32, 4096, 256), case(1, 4096, 1024)]
