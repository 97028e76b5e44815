"""What a run hears before it starts where an estimate says that it will not fit."""

from __future__ import annotations

import torch

from fastppo.model import resolve_device
from fastppo.recipe_config import Recipe
from fastppo.rollout.memory import free_memory
from fastppo.sizing.choice import cheapest_change
from fastppo.sizing.devices import Device
from fastppo.sizing.memory import memory_of
from fastppo.sizing.setup import Networks, Setup, networks_of, weights_type

GIB = 1 << 30


def memory_warning(recipe: Recipe, prompt: int) -> str | None:
    """A sentence where a step of this run, alone on its device, is estimated to need more than is free there.

    prompt: tokens of the longest prompt. Raises ValueError where the model is none that can be planned for.
    """
    device = resolve_device(recipe.device)
    on_cpu = device.type == "cpu"
    free = free_memory() if on_cpu else torch.cuda.mem_get_info(device)[0]
    dtype = weights_type(recipe.model.dtype, on_cpu)
    networks = networks_of(recipe, recipe.model.name, dtype)
    return _warning(recipe, networks, free, dtype, prompt, on_cpu)


def _warning(
    recipe: Recipe, networks: Networks, free: int, dtype: torch.dtype, prompt: int, on_cpu: bool
) -> str | None:
    device = Device("cpu" if on_cpu else "this GPU", free, 1.0, 1.0, 1.0, 1.0)  # only memory is asked about
    setup = Setup(recipe, networks, device, dtype, prompt)
    needed = memory_of(setup).peak
    if needed <= free:
        return None
    change = cheapest_change(setup)
    alone = change is not None and change.setup.ranks == 1
    hint = " ".join(change.words) if alone else "several GPUs or larger ones (fastppo plan)"
    return (
        f"a step whose completions have rollout.max_new_tokens may need about {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free here; "
        f"what would fit: {hint}"
    )
