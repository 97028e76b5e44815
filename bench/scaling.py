"""How each op's cost grows: its first case at four sizes, each twice the one before, and the exponent that fits them.

Time ~ length^exponent, by least squares of the logarithms: 1 is linear cost, 0 none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from fastppo.bench.catalog import case_file, load_cases
from fastppo.bench.harness import Case, Row
from fastppo.bench.peers import EAGER, OURS
from fastppo.bench.setting import Setting, Size

SHARES = (0.125, 0.25, 0.5, 1.0)  # of the longest
ROUNDS = 3
PROVIDER_SECONDS = 1.0  # that a provider's turns on a size may take
LEAST_POINTS = 3


@dataclass(frozen=True)
class Point:
    """One case of a curve: which number of its size grows, and how large it is here."""

    case: Case
    setting: Setting
    axis: str
    length: int


@dataclass(frozen=True)
class Curve:
    """The right rows of one provider over one axis of an op, by length."""

    op: str
    axis: str
    provider: str
    rows: tuple[Row, ...]

    @property
    def exponent(self) -> float | None:
        """None where too few sizes were measured."""
        return fit_exponent([(row.length, row.median_s) for row in self.rows])


def sizes(op: str, device: str) -> Iterator[tuple[str, int, Size]]:
    """(axis, length, size) of every point. SCALED says how many times the usual size, or that in SCALED_FROM, the longest is; a GPU's
    usual ones are long."""
    module = case_file(op)
    for axis, multiple in getattr(module, "SCALED", {}).items():
        place, usual = module.SIZES.index(axis), (module.USUAL | getattr(module, "SCALED_FROM", {}))[device]
        longest = usual[place] * (multiple if device == "cpu" else min(multiple, 1))
        for share in SHARES:
            length = int(longest * share)
            yield axis, length, (*usual[:place], length, *usual[place + 1 :])


def points(op: str, device: str) -> Iterator[Point]:
    """Of ours and eager alone: a compiler would need its time for every size. The shortest of a curve is compared with fp64."""
    compared: set[str] = set()
    for axis, length, size in sizes(op, device):
        setting = Setting(device, sizes=(size,))
        case = load_cases(op, setting)[0]
        both = {name: run for name, run in case.providers.items() if name in (OURS, EAGER)}
        unchecked = tuple(both) if axis in compared else case.unchecked
        compared.add(axis)
        yield Point(replace(case, providers=both, unchecked=unchecked), setting, axis, length)


def fit_exponent(measured: Iterable[tuple[float, float]]) -> float | None:
    """Slope of log(seconds) over log(length); None below three points."""
    logs = [(math.log(length), math.log(seconds)) for length, seconds in measured]
    if len(logs) < LEAST_POINTS:
        return None
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread if spread else None


def curves(rows: Iterable[Row]) -> list[Curve]:
    """The rows sorted into curves, in the order in which they were measured."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.status == "ok":
            found.setdefault((row.op, row.axis, row.provider), []).append(row)
    return [Curve(*key, tuple(sorted(rows, key=lambda row: row.length))) for key, rows in found.items()]
