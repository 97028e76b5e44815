"""Which settings fit a device, and the cheapest change that makes a run fit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

from fastppo.sizing.devices import MOST_DEVICES
from fastppo.sizing.memory import fits
from fastppo.sizing.setup import Setup, Sharding
from fastppo.sizing.step_time import step_time

LORA_RANK = 16


class Change(NamedTuple):
    """words: settings as they are typed, one after another. setup: with them."""

    words: list[str]
    setup: Setup

    @property
    def learns_alike(self) -> bool:
        """Whether nothing that is learned changes."""
        return not any(word.startswith(("critic.", "lora.")) for word in self.words)


def fitting_settings(setup: Setup) -> list[Setup]:
    """Of each way to shard and checkpoint that fits one, with the most tokens in a micro-batch and sequences side by side; fastest first."""
    found = [
        _largest(
            _in_this_way(
                setup, sharding, setup.config.distributed.tensor_parallel, learner__gradient_checkpointing=again
            )
        )
        for sharding, again in _ways(setup)
    ]
    return sorted((each for each in found if each is not None), key=lambda each: step_time(each).total)


def _ways(setup: Setup) -> Iterator[tuple[Sharding, bool]]:
    shardings: tuple[Sharding, ...] = ("none", "full") if setup.ranks > 1 else ("none",)
    return product(shardings, (False, True))


def _teams(setup: Setup, sharding: Sharding) -> list[int]:
    """How many ranks may sample together: first as many as do so already."""
    fitting = [size for size in setup.networks.policy.teams if setup.ranks % size == 0]
    sizes = dict.fromkeys([setup.config.distributed.tensor_parallel, 1, *fitting])
    return [size for size in sizes if size == 1 or (sharding == "full" and _may_be_together(setup, size))]


def _may_be_together(setup: Setup, team: int) -> bool:
    """Whether the other settings allow it."""
    try:
        _in_this_way(setup, "full", team)
    except ValueError:
        return False
    return True


def _in_this_way(setup: Setup, sharding: Sharding, team: int, **settings: Any) -> Setup:
    team = team if sharding == "full" else 1
    together = {"distributed__sharding": "full"} if team > 1 else {}
    return setup.changed(sharding, distributed__tensor_parallel=team, **together, **settings)


def _largest(setup: Setup) -> Setup | None:
    """The setup with as many tokens in a micro-batch and then sequences side by side as fit; None where not even the fewest do."""
    smallest = setup.changed(learner__tokens_per_microbatch=setup.longest, rollout__batch_size=1)
    if not fits(smallest):
        return None
    tokens = _most(smallest, "learner__tokens_per_microbatch", setup.longest, setup.minibatch)
    return _most(tokens, "rollout__batch_size", 1, setup.decoded)


def _most(setup: Setup, setting: str, least: int, most: int) -> Setup:
    """With the largest of `most`, and of `least` times powers of two below it, that fits; the setup fits with `least`."""
    sizes = [most]
    while (power := least << len(sizes) - 1) < most:
        sizes.append(power)
    return next(each for size in sorted(sizes, reverse=True) if fits(each := setup.changed(**{setting: size})))


def cheapest_change(setup: Setup) -> Change | None:
    """What makes a setup fit that does not: of the changes that leave what is learned as it is that with the shortest step, else a critic on the
    policy's trunk, then adapters, then more devices. None where nothing does up to 1,024 devices."""
    for changed in _alike_then_others(setup):
        if fitting := [each for each in changed if fits(each.setup)]:
            return min(fitting, key=lambda each: (step_time(each.setup).total, len(each.words)))
    return None


def _alike_then_others(setup: Setup) -> Iterator[list[Change]]:
    """Groups of changes; a later one only where none of an earlier fits."""
    yield list(_alike(Change([], setup)))
    others = list(_others(setup))
    for other in others:
        yield list(_alike(other))
    ranks = setup.ranks
    while (ranks := 2 * ranks) <= MOST_DEVICES:
        yield list(_alike(Change([f"--gpus {ranks}"], setup.changed(ranks=ranks))))


def _others(setup: Setup) -> Iterator[Change]:
    """What learns less."""
    separate = setup.critic_kind == "separate"
    own = {"critic__model": None, "critic__freeze_attention": False} if separate else {}
    if separate:
        passes = {"critic__epochs": None, "critic__tokens_per_microbatch": None}
        yield Change(["critic.kind=shared"], setup.changed(critic__kind="shared", **own, **passes))
    if not setup.config.lora.r:
        kind = {"critic__kind": "lora"} if separate else {}
        words = [f"lora.r={LORA_RANK}", *(["critic.kind=lora"] if separate else [])]
        if setup.config.distributed.tensor_parallel > 1:
            words.append("distributed.tensor_parallel=1")
        changed = {"lora__r": LORA_RANK, "distributed__tensor_parallel": 1}
        yield Change(words, setup.changed(**changed, **kind, **own))


def _alike(change: Change) -> Iterator[Change]:
    """The change with every way to shard and checkpoint, and with less at a time."""
    setup = change.setup
    ways = ((sharding, team, again) for sharding, again in _ways(setup) for team in _teams(setup, sharding))
    for sharding, team, again in ways:
        words, way = list(change.words), _in_this_way(setup, sharding, team, learner__gradient_checkpointing=again)
        if sharding != setup.sharding:
            words.append(f"distributed.sharding={sharding}")
        if team != setup.config.distributed.tensor_parallel:
            words.append(f"distributed.tensor_parallel={team}")
        if again != setup.config.learner.gradient_checkpointing:
            words.append(f"learner.gradient_checkpointing={str(again).lower()}")
        tokens = [way.microbatch, *_halves(way.microbatch, way.longest)]
        rows = [way.side_by_side, *_halves(way.side_by_side, 1)]
        for size in tokens:
            yield _with_sizes(words, way, size, rows[0])
        for count in rows[1:]:
            yield _with_sizes(words, way, tokens[0], count)
            yield _with_sizes(words, way, tokens[-1], count)


def _halves(size: int, least: int) -> Iterator[int]:
    while size > least:
        size = max(size // 2, least)
        yield size


def _with_sizes(words: list[str], setup: Setup, tokens: int, rows: int) -> Change:
    sizes = {
        "learner.tokens_per_microbatch": (setup.microbatch, tokens),
        "rollout.batch_size": (setup.side_by_side, rows),
    }
    changed = {name: new for name, (old, new) in sizes.items() if new != old}
    settings = {name.replace(".", "__"): new for name, new in changed.items()}
    return Change([*words, *(f"{name}={new}" for name, new in changed.items())], setup.changed(**settings))
