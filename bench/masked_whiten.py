"""Case of `masked_whiten`: the advantages of 256 sequences of 1,024 tokens, on a GPU of 512 of 32,768."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo import ops
from fastppo.bench import floors, peers
from fastppo.bench.harness import Case, Tensors
from fastppo.bench.setting import Setting
from fastppo.reference import masked_whiten as reference

SIZES = ("B", "T")
USUAL = {"quick": (8, 128), "cpu": (256, 1024), "cuda": (512, 32768)}
SCALED = {"T": 8}
KEPT_SHARE = 0.8


def run_with(function):
    def run(x: Tensors) -> Tensors:
        with torch.no_grad():
            return {"whitened": function(x["x"], x["mask"])}

    return run


def eager(x: Tensor, mask: Tensor) -> Tensor:
    """TRL's: Bessel's correction, 1e-8 added to the variance."""
    count = mask.sum()
    mean = (x * mask).sum() / count
    variance = ((x - mean).square() * mask).sum() / (count - 1)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def make_case(shape: tuple[int, int], device: str) -> Case:
    def inputs(generator: torch.Generator) -> Tensors:
        return {
            "x": torch.randn(shape, generator=generator) * 2 + 1,
            "mask": torch.rand(shape, generator=generator) < KEPT_SHARE,
        }

    return Case(
        op="masked_whiten",
        name=f"[{shape[0]}, {shape[1]}]",
        inputs=inputs,
        providers=peers.providers("masked_whiten", run_with, ops.masked_whiten, eager, device),
        exact=run_with(reference.masked_whiten),
        work=floors.masked_whiten(shape[0] * shape[1]),
        largest=shape[0] * shape[1],
    )


def cases(setting: Setting) -> list[Case]:
    sizes = setting.choose_sizes(USUAL)
    return [make_case(size, setting.device) for size in sizes]
