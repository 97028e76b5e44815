"""Cases of `gae`: 256 sequences of 1,024 tokens, on a GPU 512 of up to 32,768, against the loop over time that trainers write."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo import ops
from fastppo.bench import floors, peers
from fastppo.bench.harness import Case, Tensors
from fastppo.bench.setting import Setting
from fastppo.reference import gae as reference

SIZES = ("B", "T")
USUAL = {"quick": (8, 128), "cpu": (256, 1024), "cuda": (512, 32768)}
SCALED = {"T": 4}
GAMMA, LAM = 0.99, 0.95
KEPT_SHARE = 0.8


def run_with(function):
    def run(x: Tensors) -> Tensors:
        with torch.no_grad():
            advantages, returns = function(x["rewards"], x["values"], x.get("mask"), gamma=GAMMA, lam=LAM)
        return {"advantages": advantages, "returns": returns}

    return run


def eager(
    rewards: Tensor, values: Tensor, mask: Tensor | None = None, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Masked steps hand the next value and the running advantage through, as verl's loop does."""
    next_value, running, reversed_advantages = 0.0, 0.0, []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * running
        if mask is None:
            next_value, running = values[:, t], advantage
        else:
            next_value = torch.where(mask[:, t], values[:, t], next_value)
            running = torch.where(mask[:, t], advantage, running)
        reversed_advantages.append(running)
    advantages = torch.stack(reversed_advantages[::-1], dim=1)
    returns = advantages + values
    return (advantages, returns) if mask is None else (advantages * mask, returns * mask)


def make_case(shape: tuple[int, int], mask: bool, device: str) -> Case:
    def inputs(generator: torch.Generator) -> Tensors:
        columns = {name: torch.randn(shape, generator=generator) for name in ("rewards", "values")}
        return columns | ({"mask": torch.rand(shape, generator=generator) < KEPT_SHARE} if mask else {})

    return Case(
        op="gae",
        name=f"[{shape[0]}, {shape[1]}]{', mask with holes' if mask else ''}",
        inputs=inputs,
        providers=peers.providers("gae", run_with, ops.gae, eager, device, compiles=False),
        exact=run_with(reference.gae),
        work=floors.gae(shape[0] * shape[1], mask=mask),
        largest=shape[0] * shape[1],
    )


def cases(setting: Setting) -> list[Case]:
    sizes = setting.choose_sizes(USUAL)
    if setting.on_gpu:
        short = () if setting.sizes else ((512, 100 if setting.quick else 1024),)
        return [make_case(size, True, setting.device) for size in (*sizes, *short)]
    return [make_case(size, mask, setting.device) for size in sizes for mask in (False, True)]
