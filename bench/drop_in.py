"""Cases of `drop_in`: other packages' functions beside ours of their names, on the same inputs, and whole steps of their trainers, as they
come and patched. The baseline is the package's own. A package that is not installed has no case."""

from __future__ import annotations

import functools
from collections.abc import Callable

from fastppo.bench import drop_in_functions, drop_in_steps, peers
from fastppo.bench.drop_in_functions import Comparison
from fastppo.bench.harness import Case, Provider
from fastppo.bench.peers import OURS
from fastppo.bench.setting import Setting
from fastppo.bench.stand_ins import find


def calling(target: str, wrap: Callable[[Callable], Provider]) -> Provider:
    """`wrap` of a function that the first call imports."""
    made = functools.cache(lambda: wrap(find(target)))
    return lambda x: made()(x)


def make_case(one: Comparison) -> Case:
    ours, theirs = calling(one.our_target, one.wrap), calling(one.theirs, one.wrap)
    return Case(
        op="drop_in",
        name=f"{one.package} {one.function} {one.size}",
        inputs=one.inputs,
        providers={OURS: ours, one.package: theirs},
        exact=one.exact or theirs,
        compare=one.compare,
        baseline=one.package,
        imports=lambda: find(one.theirs),
        largest=one.largest,
        peaks=True,
    )


def cases(setting: Setting) -> list[Case]:
    present = peers.installed()
    functions = [one for one in drop_in_functions.comparisons(setting.quick) if one.package in present]
    steps = [make(setting.quick) for package, make in drop_in_steps.CASES if package in present]
    return [*map(make_case, functions), *steps]
