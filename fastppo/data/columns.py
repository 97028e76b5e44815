"""Columns whose texts the user declares to stand for something else: integers, numbers, truth values, JSON."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral
from typing import Any

from fastppo.data.files import parse_json


def declared(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """The row with the values of `columns` as they are declared there; an empty text is None. Raises ValueError naming `where`."""
    return {**row, **{name: _as(kind, row[name], name, where) for name, kind in columns.items() if name in row}}


def check_declared(columns: Mapping[str, str], names: Iterable[str]) -> None:
    """Raises ValueError for a declared column that is not among the data's."""
    names = sorted(names)
    for name in columns:
        if name not in names:
            raise ValueError(
                f"columns declares {name!r}{did_you_mean(name, names)}, expected one of the data's: {', '.join(map(repr, names))}"
            )


def did_you_mean(name: str, names: Iterable[str], form: str = "{!r}") -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {form.format(close[0])}?)" if close else ""


def _as(kind: str, value: Any, name: str, where: str) -> Any:
    if value is None or isinstance(value, str) and not value.strip():
        return None
    expected, parse, fits = _KINDS[kind]
    try:
        if isinstance(value, str):
            return parse(value.strip())
        if fits(value):
            return float(value) if kind == "float" else value
        reason = ""
    except ValueError as error:
        reason = f": {error}" if kind == "json" else ""
    raise ValueError(f"{where}: column {name!r} is {value!r}, expected {expected} as declared in columns{reason}")


def _integer(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]+", text):  # Python's own also takes 1_000
        raise ValueError
    return int(text)


def _number(text: str) -> float:
    if "_" in text:
        raise ValueError
    return float(text)


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


# What is expected, how a text of it is read, and whether a value that is no text is one already.
_KINDS: dict[str, tuple[str, Callable[[str], Any], Callable[[Any], bool]]] = {
    "int": ("an integer", _integer, _is_integer),
    "float": ("a number", _number, lambda value: _is_integer(value) or isinstance(value, float)),
    "bool": ("true or false", _truth, lambda value: isinstance(value, bool)),
    "json": ("JSON", parse_json, lambda value: True),
}
