"""What the project promises of its own rows: `targets.toml`, one table a device and op, one line a case."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

from fastppo import native
from fastppo.bench.catalog import load_cases, ops_on
from fastppo.bench.harness import Target
from fastppo.bench.setting import Setting

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT = Path(__file__).with_name("targets.toml")
DEVICES = ("cpu", "cuda")
ISAS = ("avx512", "avx2", "plain")


@dataclass(frozen=True)
class Targets:
    """The targets of one device's cases, and the file that they stand in."""

    file: Path
    of_cases: Mapping[tuple[str, str], Target]

    def of(self, op: str, case: str) -> Target:
        return self.of_cases.get((op, case), Target())


def load(file: Path, device: str) -> Targets:
    """The targets that `file` has for the cases on `device`; ValueError names the line that is about nothing."""
    try:
        data = tomllib.loads(file.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is not TOML: {error}") from error
    found = {}
    for section, ops in data.items():
        expect_known(file, "device", section, DEVICES)
        for op, cases in expect_table(file, section, ops).items():
            expect_known(file, f"op of {section}", op, ops_on(section))
            known = [case.name for case in load_cases(op, Setting(section))]
            for name, target in expect_table(file, f"{section}.{op}", cases).items():
                expect_known(file, f"case of {section}.{op}", name, known)
                found[section, op, name] = read_target(file, f"{section}.{op}.{name!r}", target)
    return Targets(file, {(op, name): target for (section, op, name), target in found.items() if section == device})


def read_target(file: Path, where: str, data: object) -> Target:
    names = [field.name for field in fields(Target)]
    for name, value in expect_table(file, where, data).items():
        expect_known(file, f"field of {where}", name, names)
        for number in of_each_isa(file, f"{where}.{name}", value).values():
            if isinstance(number, bool) or not isinstance(number, int | float) or not number > 0:
                raise ValueError(f"{file}: {where}.{name} is {number!r}, expected a number above 0")
    here = native.cpu_isa()
    return Target(**{name: of_each_isa(file, where, value).get(here) for name, value in data.items()})


def of_each_isa(file: Path, where: str, value: object) -> dict[str, object]:
    """The number that `value` is for every instruction set, or those that it names."""
    if not isinstance(value, dict):
        return dict.fromkeys((*ISAS, "none"), value)
    for isa in value:
        expect_known(file, f"instruction set of {where}", isa, ISAS)
    return value


def expect_table(file: Path, where: str, data: object) -> dict:
    if not isinstance(data, dict):
        raise ValueError(f"{file}: {where} is {data!r}, expected a table")
    return data


def expect_known(file: Path, what: str, name: str, known: Iterable[str]) -> None:
    """ValueError naming the nearest of `known` where `name` is none of them."""
    known = list(known)
    if name not in known:
        nearest = get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"{file}: unknown {what}: {name!r}, did you mean {nearest!r}?")
