"""Cases of `ppo_loss`: 256 K tokens, on a GPU 1 M, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo import ops
from fastppo.bench import floors, peers
from fastppo.bench.harness import Case, Tensors
from fastppo.bench.setting import Setting
from fastppo.reference import ppo_loss as reference

SIZES = ("N",)
USUAL = {"quick": (1 << 10,), "cpu": (1 << 18,), "cuda": (1 << 20,)}
SCALED = {"N": 4}
KEPT_SHARE = 0.8
NEAR = 1e-5  # a kink of the loss
CLIP, VALUE_CLIP, VF_COEF, KL_COEF = 0.2, 0.2, 0.1, 0.05


def policy_alone(inputs: Tensors) -> Tensors:
    return {name: inputs[name] for name in ("logprobs", "old_logprobs", "advantages", "mask")}


def smooth_step(step: Tensor) -> Tensor:
    """0 where the ratio exp(step) is so near a clip bound that rounding decides whether there is a gradient."""
    ratio = step.exp()
    near = ((ratio - (1 - CLIP)).abs() < NEAR) | ((ratio - (1 + CLIP)).abs() < NEAR)
    return step.masked_fill(near, 0)


def smooth_move(move: Tensor, wanted: Tensor) -> Tensor:
    """0 where rounding decides whether a value that moved is clipped, or whether it or the clipped one is further from the wanted move."""
    clipped = move.clamp(-VALUE_CLIP, VALUE_CLIP)
    even = ((move - wanted).abs() - (clipped - wanted).abs()).abs() < NEAR
    near = ((move.abs() - VALUE_CLIP).abs() < NEAR) | (even & (move != clipped))
    return move.masked_fill(near, 0)


def make_inputs(tokens: int, generator: torch.Generator) -> Tensors:
    def noise() -> Tensor:
        return torch.randn(tokens, generator=generator)

    old_logprobs = -torch.rand(tokens, generator=generator) * 5
    old_values = noise()
    returns = old_values + noise()
    return {
        "logprobs": (old_logprobs + smooth_step(0.2 * noise())).requires_grad_(),
        "old_logprobs": old_logprobs,
        "advantages": noise(),
        "mask": torch.rand(tokens, generator=generator) < KEPT_SHARE,
        "values": (old_values + smooth_move(0.2 * noise(), returns - old_values)).requires_grad_(),
        "old_values": old_values,
        "returns": returns,
        "ref_logprobs": old_logprobs + 0.3 * noise(),
    }


def run_with(function):
    def run(x: Tensors) -> Tensors:
        options = {"value_clip": VALUE_CLIP, "vf_coef": VF_COEF, "kl_coef": KL_COEF} if "values" in x else {}
        loss, *_ = function(**x, clip_low=CLIP, clip_high=CLIP, **options)
        wanted = [name for name in ("logprobs", "values") if name in x]
        gradients = torch.autograd.grad(loss, [x[name] for name in wanted])
        return {"loss": loss.detach()} | {f"d_{name}": d for name, d in zip(wanted, gradients, strict=True)}

    return run


def eager(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float,
    values: Tensor | None = None, old_values: Tensor | None = None, returns: Tensor | None = None,
    ref_logprobs: Tensor | None = None, value_clip: float = 0.0, vf_coef: float = 0.0, kl_coef: float = 0.0,
) -> tuple[Tensor]:  # fmt: skip
    """The loss alone: our op returns its statistics too."""
    ratio = (logprobs - old_logprobs).exp()
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped_ratio)
    if values is not None:
        clipped_values = torch.clamp(values, old_values - value_clip, old_values + value_clip)
        value = 0.5 * torch.maximum((values - returns).square(), (clipped_values - returns).square())
        difference = ref_logprobs - logprobs
        kl = difference.exp() - 1 - difference
        loss = loss + vf_coef * value + kl_coef * kl
    return ((loss * mask).sum() / mask.sum(),)


def make_case(tokens: int, whole: bool, device: str) -> Case:
    def inputs(generator: torch.Generator) -> Tensors:
        made = make_inputs(tokens, generator)
        return made if whole else policy_alone(made)

    return Case(
        op="ppo_loss",
        name=f"{tokens} tokens, policy{' + value + KL' if whole else ''}, forward + backward",
        inputs=inputs,
        providers=peers.providers("ppo_loss", run_with, ops.ppo_loss, eager, device),
        exact=run_with(reference.ppo_loss),
        work=floors.ppo_loss(tokens, values=whole, reference=whole),
        largest=tokens,
    )


def cases(setting: Setting) -> list[Case]:
    sizes = setting.choose_sizes(USUAL)
    parts = (False, True) if setting.on_gpu else (True,)
    return [make_case(tokens, whole, setting.device) for (tokens,) in sizes for whole in parts]
