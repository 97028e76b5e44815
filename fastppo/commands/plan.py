"""`fastppo plan`: memory, shortest time and cost of a run on GPUs, before there are any."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from fastppo.recipe import load_recipe
from fastppo.recipe_config import Recipe
from fastppo.sizing import (
    Change,
    Setup,
    cheapest_change,
    device_named,
    fitting_settings,
    memory_of,
    networks_of,
    step_time,
)
from fastppo.sizing.devices import GB, MOST_DEVICES, USABLE
from fastppo.sizing.memory import fits
from fastppo.sizing.setup import weights_type

GIB = 1 << 30
PROMPT = 512
COUNTS = tuple(1 << power for power in range(11))
"""1, 2, 4, ..., 1,024 devices."""


def run(options: argparse.Namespace) -> int:
    """0 where the run fits, 1 where it does not."""
    console = Console(highlight=False, soft_wrap=True)
    setup = _setup(options, 1 if options.gpus is None else options.gpus)
    console.print(_heading(setup))
    if options.gpus is None:
        team = setup.config.distributed.tensor_parallel
        counts = [ranks for ranks in COUNTS if ranks % team == 0]
        if not counts:
            raise ValueError(f"distributed.tensor_parallel is {team}, expected a power of two without --gpus")
        table = _table_of_counts(
            [_sharded(setup.changed(ranks=ranks), options.sharding) for ranks in counts], options.price
        )
        console.print(table)
        return 0
    setup = _sharded(setup, options.sharding)
    console.print(_memory_table(setup))
    console.print(_verdict(setup))
    if not fits(setup):
        change = cheapest_change(setup)
        console.print(_advice(change))
        return 1
    console.print(_time_table(setup, options.price))
    console.print(_settings_table(fitting_settings(setup)))
    return 0


def _setup(options: argparse.Namespace, ranks: int) -> Setup:
    """What the options say. Raises ValueError for one that is out of range."""
    overrides, path = list(options.overrides), options.recipe
    if path is not None and "=" in path:
        overrides, path = [path, *overrides], None
    if not 1 <= ranks <= MOST_DEVICES:
        raise ValueError(f"--gpus is {ranks}, expected 1 to {MOST_DEVICES}")
    for name in ("prompt_tokens", "price", "network"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} is {value:g}, expected a number above 0")
    recipe, device = load_recipe(path, overrides), device_named(options.gpu)
    team = recipe.distributed.tensor_parallel
    if options.gpus is not None and ranks % team:
        raise ValueError(f"distributed.tensor_parallel is {team}, expected a divisor of --gpus {ranks}")
    dtype = weights_type(recipe.model.dtype, device.name == "cpu")
    networks = networks_of(recipe, options.model, dtype)
    prompt = _prompt_tokens(options.prompt_tokens or recipe.data.max_prompt_tokens, recipe, networks.policy.context)
    return Setup(recipe, networks, device, dtype, prompt, ranks, network=options.network * GB)


def _prompt_tokens(said: int | None, recipe: Recipe, context: int | None) -> int:
    """Of the longest prompt: as it is said, else 512 or what the model's context leaves."""
    new = recipe.rollout.max_new_tokens
    room = PROMPT if context is None else context - new
    prompt = said or max(1, min(PROMPT, room))
    if context is not None and prompt > room:
        raise ValueError(
            f"prompts of {prompt} and completions of rollout.max_new_tokens = {new} tokens are {prompt + new} together, "
            f"expected at most {context}, the model's context"
        )
    return prompt


def _sharded(setup: Setup, asked: str | None) -> Setup:
    """As asked, else as the recipe spreads them, else whole weights where they fit, and spread ones where not."""
    if asked is not None:
        return setup.changed(asked)
    if setup.config.distributed.sharding == "full":
        return setup.changed("full")
    if setup.ranks == 1 or fits(setup):
        return setup
    return setup.changed("full")


def _heading(setup: Setup) -> str:
    policy, rollout = setup.networks.policy, setup.config.rollout
    return (
        f"{policy.name}: {policy.parameters / 1e9:.3g} G parameters in {str(setup.dtype).removeprefix('torch.')}; steps of "
        f"{rollout.prompts_per_step} prompts of {setup.prompt} tokens with {rollout.samples_per_prompt} x {setup.new} new ones, as many as may come"
    )


def _memory_table(setup: Setup) -> Table:
    found, title = (
        memory_of(setup),
        f"\nMemory of each of {setup.ranks} x {setup.device.name}, sharding {setup.sharding}{_together(setup)}",
    )
    table = Table("part", "GiB", "share", title=title, title_justify="left", box=None)
    for name, size in sorted(found.parts.items(), key=lambda part: -part[1]):
        table.add_row(name, _gib(size), f"{size / found.peak:.0%}")
    table.add_row(f"peak ({found.peak_moment})", _gib(found.peak), "100%")
    return table


def _together(setup: Setup) -> str:
    return "" if setup.team == 1 else f", {setup.team} sampling together"


def _gib(size: float) -> str:
    return f"{size / GIB:.3g}" if size < GIB else f"{size / GIB:.1f}"


def _verdict(setup: Setup) -> str:
    peak, may = memory_of(setup).peak, USABLE * setup.memory
    return f"\n{'fits' if peak <= may else 'does not fit'}: {_gib(peak)} of {_gib(may)} GiB, {USABLE:.0%} of {_gib(setup.memory)}"


def _advice(change: Change | None) -> str:
    if change is None:
        return f"no setting makes it fit, nor do {MOST_DEVICES} of these devices"
    seconds, size = step_time(change.setup).total, memory_of(change.setup).peak
    told = "" if change.learns_alike else "; this changes what is learned"
    return f"the cheapest change that fits: {' '.join(change.words)} ({_gib(size)} GiB, a step of at least {_seconds(seconds)}{told})"


def _time_table(setup: Setup, price: float | None) -> Table:
    found = step_time(setup)
    table = Table("phase", "at least", "share", title="\nA step's shortest time", title_justify="left", box=None)
    for name, seconds in found._asdict().items():
        table.add_row(name, _seconds(seconds), f"{seconds / found.total:.0%}")
    table.add_row("step", _seconds(found.total), "100%")
    table.add_row(f"run of {setup.config.total_steps} steps", _seconds(found.total * setup.config.total_steps), "")
    if price is not None:
        table.add_row(f"cost of the run, {setup.ranks} x {price:g} an hour", f"{_cost(setup, price):.4g}", "")
    return table


def _cost(setup: Setup, price: float) -> float:
    return setup.ranks * price * step_time(setup).total * setup.config.total_steps / 3600


def _settings_table(setups: Sequence[Setup]) -> Table:
    columns = "sharding", "checkpointing", "micro-batch", "batch_size", "GiB", "step, at least"
    title = "\nSettings that fit, each with the most tokens in a micro-batch and sequences side by side"
    table = Table(*columns, title=title, title_justify="left", box=None)
    for each in setups:
        learner = each.config.learner
        table.add_row(
            each.sharding,
            str(learner.gradient_checkpointing).lower(),
            str(each.microbatch),
            str(each.side_by_side),
            _gib(memory_of(each).peak),
            _seconds(step_time(each).total),
        )
    return table


def _table_of_counts(setups: Sequence[Setup], price: float | None) -> Table:
    columns = ["GPUs", "sharding", "GiB", "fits", "step, at least", "communication"]
    title = f"\nOn {setups[0].device.name}, up to {_gib(USABLE * setups[0].device.memory)} GiB each"
    table = Table(
        *columns, *([] if price is None else ["cost of the run"]), title=title, title_justify="left", box=None
    )
    for each in setups:
        found, fitting = step_time(each), fits(each)
        row = [str(each.ranks), each.sharding, _gib(memory_of(each).peak), "yes" if fitting else "no"]
        row += [_seconds(found.total), f"{found.communication / found.total:.0%}"] if fitting else ["", ""]
        table.add_row(*row, *([] if price is None or not fitting else [f"{_cost(each, price):.4g}"]))
    return table


def _seconds(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
