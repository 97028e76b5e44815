"""A linear layer with low-rank adapters, as peft puts it in place of a plain one: y = x (W + scaling B A)^T (Hu et al. 2021, arXiv:2106.09685).

Nothing here imports peft: whoever has such layers has imported it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastppo.native.matmul import matmul
from fastppo.ops._backends import choose


class Factors(NamedTuple):
    """What an adapter adds to a weight [N, K]: scaling b a."""

    a: Tensor  # [r, K]
    b: Tensor  # [N, r]
    scaling: float


def is_plain_lora(module: nn.Module) -> bool:
    """Whether the module is a plain linear layer with LoRA's factors beside it and nothing more: no DoRA, bias or other variant, not merged."""
    layers = sys.modules.get("peft.tuners.lora.layer")
    if layers is None or type(module) is not layers.Linear or type(module.base_layer) is not nn.Linear:
        return False
    drops = any(getattr(dropout, "p", 0) for dropout in module.lora_dropout.values())
    return not (
        module.lora_variant or any(module.lora_bias.values()) or module.merged or module.fan_in_fan_out or drops
    )


def active_factors(module: nn.Module) -> Factors | None:
    """Of the layer's adapter that is active; None where its base weight stands alone. Raises ValueError where several are active."""
    if module.disable_adapters:
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    if len(names) > 1:
        raise ValueError(
            f"the adapters {', '.join(names)} are active, expected one: model.set_adapter(name) chooses it"
        )
    if not names:
        return None
    name = names[0]
    return Factors(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])


@torch.no_grad()
def merged(weight: Tensor, factors: Factors | None) -> Tensor:
    """weight [N, K] + scaling b a in its type; itself without factors. On a CPU in fp32 its bits do not depend on the number of threads."""
    if factors is None:
        return weight
    a, b, scaling = factors
    same = a.dtype == b.dtype == weight.dtype == torch.float32
    if same and choose("batch_invariant_linear", weight) == "cpu":
        return matmul(b * scaling, a, weight.clone(), accumulate=True)
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.addmm(weight.to(wide), b.to(wide), a.to(wide), alpha=scaling).to(weight.dtype)


def factor_gradients(d_out: Tensor, x: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """Gradients of a and b from those of the layer's output, d_out [T, N], and its input, x [T, K]; all fp32 on the CPU."""
    a, b, scaling = factors
    d_a = matmul(matmul(d_out, b).t(), x).mul_(scaling)
    d_b = matmul(d_out.t(), matmul(x, a.t())).mul_(scaling)
    return d_a, d_b


def without_adapters(name: str) -> str:
    """The name that a parameter has in the model without adapters."""
    return name.replace(".base_layer.", ".")


def lora_layers(model: nn.Module) -> Sequence[tuple[str, nn.Module]]:
    """(name, module) of what peft has put in place of the model's own layers."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return ()
    return [(name, module) for name, module in model.named_modules() if isinstance(module, tuners.BaseTunerLayer)]
