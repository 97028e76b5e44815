"""Case of `linear_ppo_loss`: from hidden states to loss and gradients, logits never whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastppo import ops
from fastppo.bench import floors, peers
from fastppo.bench.harness import Case, Tensors
from fastppo.bench.setting import DTYPES, Setting, suffix
from fastppo.reference import linear_ppo_loss as reference

SIZES = ("N", "H", "V")
USUAL = {"quick": (32, 64, 1000), "cpu": (256, 512, 32000), "cuda": (8192, 4096, 131072)}
SCALED = {"V": 1}
TYPED = True
KEPT_SHARE = 0.8
CLIP = 0.2


def run_with(function):
    def run(x: Tensors) -> Tensors:
        loss, *_ = function(**x, clip_low=CLIP, clip_high=CLIP)
        d_hidden, d_weight = torch.autograd.grad(loss, (x["hidden"], x["weight"]))
        return {"loss": loss.detach(), "d_hidden": d_hidden, "d_weight": d_weight}

    return run


def eager(
    hidden: Tensor, weight: Tensor, labels: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *,
    clip_low: float, clip_high: float,
) -> tuple[Tensor]:  # fmt: skip
    """As exact as the logits, which the product rounds to the head's type: the result says so by its own."""
    log_p = torch.log_softmax(F.linear(hidden, weight).float(), dim=-1)
    ratio = (log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - old_logprobs).exp()
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    policy = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)
    return (((policy * mask).sum() / mask.sum()).to(weight.dtype),)


def make_case(rows: int, hidden: int, vocab: int, dtype_name: str, device: str) -> Case:
    dtype, spread = DTYPES[dtype_name], 1 if device == "cuda" else 2

    def inputs(generator: torch.Generator) -> Tensors:
        states = torch.randn(rows, hidden, generator=generator).to(dtype)
        weight = (torch.randn(vocab, hidden, generator=generator) * spread / hidden**0.5).to(dtype)
        labels = torch.randint(vocab, (rows,), generator=generator)
        logprobs = torch.log_softmax((states @ weight.T).float(), dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return {
            "hidden": states.requires_grad_(),
            "weight": weight.requires_grad_(),
            "labels": labels,
            "old_logprobs": logprobs + 0.2 * torch.randn(rows, generator=generator),
            "advantages": torch.randn(rows, generator=generator),
            "mask": torch.rand(rows, generator=generator) < KEPT_SHARE,
        }

    return Case(
        op="linear_ppo_loss",
        name=f"{rows} tokens, H={hidden}, V={vocab}{suffix(dtype_name)}, forward + backward",
        inputs=inputs,
        providers=peers.providers("linear_ppo_loss", run_with, ops.linear_ppo_loss, eager, device),
        exact=run_with(reference.linear_ppo_loss),
        work=floors.linear_ppo_loss(rows, hidden, vocab, dtype.itemsize),
        largest=rows * vocab,
        dtype=dtype_name,
    )


def cases(setting: Setting) -> list[Case]:
    sizes = setting.choose_sizes(USUAL)
    return [make_case(*size, setting.choose_dtype(), setting.device) for size in sizes]
