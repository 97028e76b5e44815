"""`data.prompt_template` and its like: texts with columns in braces."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastppo.data.columns import did_you_mean

LATEX_COMMAND = re.compile(r"\\[A-Za-z]+\*?(\[[^\]]*\])?$")
LOST_BACKSLASH = {"\a": "a", "\b": "b", "\f": "f", "\v": "v"}
DOUBLED = "braces that stand for themselves are doubled: {{ }}"


class PromptTemplate:
    """Replaces `{column}`; `{{` and `}}` are braces that stand for themselves, as in Python's format strings.

    Raises ValueError for anything else in braces, and for a column right after a LaTeX command, whose braces are LaTeX's own:
    `\\boxed{answer}` would put the answer that is asked for into the prompt.
    """

    def __init__(self, template: str, columns: Sequence[str], what: str = "prompt") -> None:
        self._template, self._what = template, what
        for character, letter in LOST_BACKSLASH.items():
            if character in template:
                raise self._refusal(
                    f"holds the control character that \\{letter} is in quoted text: double the backslash"
                )
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise self._refusal(f"cannot be read: {error}; {DOUBLED}") from error
        self._pieces = [(literal, column) for literal, column, _, _ in parts]
        for literal, column, options, conversion in parts:
            if column is not None:
                self._check(literal, column, options or conversion, columns)

    @property
    def only_column(self) -> str | None:
        """The column that the template consists of, or None."""
        return self._pieces[0][1] if len(self._pieces) == 1 and not self._pieces[0][0] else None

    def names(self, column: str) -> bool:
        return any(column == named for _, named in self._pieces)

    def __call__(self, row: Mapping[str, Any], number: int) -> str:
        """The text of a row. Raises ValueError for a value that is no text and no finite number, naming row and column."""
        text = "".join(literal + _field(row, column, number) for literal, column in self._pieces)
        if not text.strip():
            raise ValueError(f"the {self._what} of row {number} is empty: {text!r}")
        return text

    def _check(self, literal: str, column: str, options: str | None, columns: Sequence[str]) -> None:
        if options or column not in columns:
            hint = did_you_mean(column, columns, "{{{}}}")
            known = ", ".join(map(repr, columns))
            raise self._refusal(
                f"names the column {column!r}{hint}, expected one of the data's, without options: {known}; {DOUBLED}"
            )
        if command := LATEX_COMMAND.search(literal):
            command = command[0]
            raise self._refusal(
                f"has {command}{{{column}}}, which would put the column {column!r} into every {self._what}: write {command}{{{{{column}}}}} "
                f"for LaTeX's braces around the word, {command}{{{{{{{column}}}}}}} for LaTeX's braces around the column's value"
            )

    def _refusal(self, why: str) -> ValueError:
        return ValueError(f"{self._what}_template is {self._template!r}, which {why}")


def _field(row: Mapping[str, Any], column: str | None, number: int) -> str:
    value = "" if column is None else row[column]
    if isinstance(value, str | int | np.integer) or isinstance(value, float | np.floating) and math.isfinite(value):
        return str(value)
    odd = value if isinstance(value, float) else type(value).__name__
    raise ValueError(f"column {column!r} of row {number} is {odd}, expected a text or a number")
