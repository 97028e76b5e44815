"""Cases of `ppo_loss`: 256 K tokens, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo import ops
from fastppo.bench import floors
from fastppo.bench.harness import Case, Target, Tensors
from fastppo.reference import ppo_loss as reference

KEPT_SHARE = 0.8
CLIP, VALUE_CLIP, VF_COEF, KL_COEF = 0.2, 0.2, 0.1, 0.05


def make_inputs(tokens: int, generator: torch.Generator) -> Tensors:
    def noise() -> Tensor:
        return torch.randn(tokens, generator=generator)

    old_logprobs = -torch.rand(tokens, generator=generator) * 5
    old_values = noise()
    return {
        "logprobs": (old_logprobs + 0.2 * noise()).requires_grad_(),
        "old_logprobs": old_logprobs,
        "advantages": noise(),
        "mask": torch.rand(tokens, generator=generator) < KEPT_SHARE,
        "values": (old_values + 0.2 * noise()).requires_grad_(),
        "old_values": old_values,
        "returns": old_values + noise(),
        "ref_logprobs": old_logprobs + 0.3 * noise(),
    }


def run_with(function):
    def run(x: Tensors) -> Tensors:
        loss, *_ = function(**x, clip_low=CLIP, clip_high=CLIP, value_clip=VALUE_CLIP, vf_coef=VF_COEF, kl_coef=KL_COEF)
        d_logprobs, d_values = torch.autograd.grad(loss, (x["logprobs"], x["values"]))
        return {"loss": loss.detach(), "d_logprobs": d_logprobs, "d_values": d_values}

    return run


def eager(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, values: Tensor, old_values: Tensor,
    returns: Tensor, ref_logprobs: Tensor, clip_low: float, clip_high: float, value_clip: float, vf_coef: float,
    kl_coef: float,
) -> tuple[Tensor]:  # fmt: skip
    """The loss alone: our op returns its statistics too."""
    ratio = (logprobs - old_logprobs).exp()
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    policy = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)
    clipped_values = torch.clamp(values, old_values - value_clip, old_values + value_clip)
    value = 0.5 * torch.maximum((values - returns).square(), (clipped_values - returns).square())
    difference = ref_logprobs - logprobs
    kl = difference.exp() - 1 - difference
    return (((policy + vf_coef * value + kl_coef * kl) * mask).sum() / mask.sum(),)


def cases(quick: bool) -> list[Case]:
    tokens = 1 << (10 if quick else 18)
    return [
        Case(
            op="ppo_loss",
            name=f"{tokens} tokens, policy + value + KL, forward + backward",
            inputs=lambda generator: make_inputs(tokens, generator),
            providers={"fastppo": run_with(ops.ppo_loss), "eager": run_with(eager)},
            exact=run_with(reference.ppo_loss),
            work=floors.ppo_loss(tokens, values=True, reference=True),
            target=Target(speedup=4.0),
        )
    ]
