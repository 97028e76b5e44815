"""What a debate is: who speaks when, and what they read before."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from string import Formatter
from typing import Annotated

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from fastppo.setting_types import STRICT

SeatName = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]
OWN_COLUMNS = ("seat", "transcript")
"""What reward functions are told beside the data's columns: whose words they pay, and all that was said."""


@dataclass(config=STRICT)
class Speech:
    """One turn of a debate."""

    seat: SeatName
    """Who speaks. The name stands in templates and in the names of metrics."""
    reads: str | None = None
    """What the seat is given to read before: `{name}` is what another seat said last, or a column of the data (`{prompt}` is the prompt's text);
    `{{` and `}}` are braces that stand for themselves. None, in a seat's first speech, is the prompt as it is."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Those in braces in `reads`."""
        return tuple(name for _, name, _, _ in Formatter().parse(self.reads or "") if name is not None)


@dataclass(config=ConfigDict(extra="forbid", validate_default=True))
class Debate:
    """Speeches of two or more seats about a prompt. Each seat's words are a sequence of its own, with what it read between them and a reward of
    its own, which reward functions decide. A speech begins once all that it reads was said: seats that do not read each other speak side by side.
    """

    speeches: list[Speech]
    """In the order in which they would be held one after another."""
    answers: SeatName | None = None
    """The seat whose score is the debate's in evaluations; by default who speaks last."""
    own_adapters: bool = False
    """Each seat speaks with, and learns in, an adapter of its own on the one trunk (`lora.r` above 0, or a PeftModel): the run's adapter is that of
    the seat that `answers`, and the others' begin as copies of it. By default one policy speaks in all seats."""

    @model_validator(mode="after")
    def _check(self) -> Debate:
        if len(self.seats) < 2:
            raise ValueError(f"speeches has the seats {list(self.seats)}, expected at least two")
        if self.answers not in (None, *self.seats):
            raise ValueError(f"answers is {self.answers!r}, expected one of the seats {', '.join(self.seats)}")
        for number, speech in enumerate(self.speeches):
            self._check_speech(number, speech)
        return self

    def _check_speech(self, number: int, speech: Speech) -> None:
        where, before = f"speeches[{number}].reads", {other.seat for other in self.speeches[:number]}
        if speech.reads is None and speech.seat in before:
            raise ValueError(f"{where} is None, expected a text: {speech.seat} has read the prompt already")
        try:
            parts = [part for part in Formatter().parse(speech.reads or "") if part[1] is not None]
        except ValueError as error:
            raise ValueError(f"{where} is {speech.reads!r}: {error} (literal braces are {{{{ and }}}})") from error
        for _, name, form, conversion in parts:
            if not name.isidentifier() or form or conversion:
                raise ValueError(f"{where} has {{{name}}}, expected the plain name of a seat or a column in its braces")
            if name in self.seats and name not in before:
                raise ValueError(f"{where} has {{{name}}}, expected a seat that has spoken before: {name} speaks later")

    @cached_property
    def seats(self) -> tuple[str, ...]:
        """Names, in the order in which they speak first."""
        return tuple(dict.fromkeys(speech.seat for speech in self.speeches))

    @property
    def answering(self) -> str:
        return self.answers or self.speeches[-1].seat

    @cached_property
    def sources(self) -> tuple[dict[str, int], ...]:
        """Of each speech: seat that it reads -> the number of the speech that is read, the seat's latest; itself among them where it spoke before."""
        latest: dict[str, int] = {}
        found = []
        for number, speech in enumerate(self.speeches):
            found.append({seat: latest[seat] for seat in (*speech.names, speech.seat) if seat in latest})
            latest[speech.seat] = number
        return tuple(found)

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raises ValueError for data with these columns where a template names something else, or where a name means two things."""
        columns = [*dict.fromkeys(["prompt", *columns])]
        for name in columns:
            if name in (*OWN_COLUMNS, *self.seats):
                raise ValueError(f"the data has a column {name!r}, expected another name: a debate has its own")
        for number, speech in enumerate(self.speeches):
            for name in speech.names:
                if name not in (*columns, *self.seats):
                    raise ValueError(
                        f"speeches[{number}].reads of the debate has {{{name}}}, expected a seat that has spoken "
                        f"({', '.join(self.seats)}) or a column ({', '.join(columns)})"
                    )
