"""Case of `approx_kl`: the k3 estimate of 256 K tokens, on a GPU of 1 M, with its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo import ops
from fastppo.bench import floors, peers
from fastppo.bench.harness import Case, Tensors
from fastppo.bench.setting import Setting
from fastppo.reference import approx_kl as reference

SIZES = ("N",)
USUAL = {"quick": (1 << 10,), "cpu": (1 << 18,), "cuda": (1 << 20,)}
SCALED = {"N": 8}


def run_with(function):
    def run(x: Tensors) -> Tensors:
        kl = function(x["logprobs"], x["ref_logprobs"], kind="k3")
        (grad,) = torch.autograd.grad(kl, x["logprobs"], x["d_kl"])
        return {"kl": kl.detach(), "d_logprobs": grad}

    return run


def eager(logprobs: Tensor, ref_logprobs: Tensor, *, kind: str) -> Tensor:
    """k3 = exp(d) - 1 - d with d = ref_logprobs - logprobs."""
    difference = ref_logprobs - logprobs
    return difference.exp() - 1 - difference


def make_case(tokens: int, device: str) -> Case:
    def inputs(generator: torch.Generator) -> Tensors:
        logprobs = -torch.rand(tokens, generator=generator) * 5
        return {
            "logprobs": logprobs.clone().requires_grad_(),
            "ref_logprobs": logprobs + 0.5 * torch.randn(tokens, generator=generator),
            "d_kl": torch.randn(tokens, generator=generator),
        }

    return Case(
        op="approx_kl",
        name=f"{tokens} tokens, k3, forward + backward",
        inputs=inputs,
        providers=peers.providers("approx_kl", run_with, ops.approx_kl, eager, device),
        exact=run_with(reference.approx_kl),
        work=floors.approx_kl(tokens, backward=True),
        largest=tokens,
    )


def cases(setting: Setting) -> list[Case]:
    sizes = setting.choose_sizes(USUAL)
    return [make_case(*size, setting.device) for size in sizes]
