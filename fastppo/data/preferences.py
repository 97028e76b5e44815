"""Pairs of a chosen and a rejected answer, as token ids that a reward model learns from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastppo.data.prompts import hold_out
from fastppo.data.sources import Row, rows_of
from fastppo.model import encode_answered
from fastppo.recipe_config import DataConfig
from fastppo.reward_model_config import PreferencesConfig

Text = str | list[Row]

KINDS = {str: "a text", list: "a conversation", type(None): "nothing"}


@dataclass(frozen=True)
class Preference:
    """Of two answers to a prompt the better and the worse one."""

    prompt: Text
    """A text or messages; empty where `chosen` and `rejected` are whole texts or conversations."""
    chosen: Text
    rejected: Text
    chosen_ids: list[int]
    """What the reward model reads of prompt and answer."""
    rejected_ids: list[int]
    margin: float | None
    """By how much the chosen score is to be above the rejected one; None where the data do not say."""


def load_preferences(
    config: PreferencesConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    vocab_size: int,
    note: Callable[[str], None],
) -> tuple[list[Preference], list[Preference]]:
    """(pairs to train on, held-out pairs).

    Where the answers are whole texts without a `prompt` the tokenizer loses its chat template: what is read as plain text here is read so later.

    Args:
        max_tokens: longest text that the model is to read; pairs with a longer one are left out.
        vocab_size: rows of the model's embedding.
        note: is told what was left out, and of pairs that contradict each other.

    Raises:
        ValueError, TypeError: a file that cannot be read; a row without `chosen` or `rejected`, or with another kind of them than the first row
            has; a margin that is no number; a conversation that makes no text; a token without an embedding; no pair left.
    """
    if not config.path:
        raise ValueError("data.path is empty; the recipe has to set it")
    sources = DataConfig(**dataclasses.asdict(config))
    rows = rows_of(config.path, sources)
    train, held_out, first = hold_out(rows, sources)
    _check(train, 0)
    _check(held_out, first, like=train[0])
    if isinstance(train[0]["chosen"], str) and train[0].get("prompt") is None and tokenizer.chat_template:
        tokenizer.chat_template = None
        note("the pairs are whole texts without a prompt: the model reads plain texts, its chat template is left out")
    read = _Reader(tokenizer, max_tokens, vocab_size, note)
    return read(train, 0, "pairs to train on"), read(held_out, first, "held-out pairs")


def _check(rows: Sequence[Row], first: int, like: Row | None = None) -> None:
    """Raises ValueError naming the row that is no pair, or one of another kind than `like`, else the first."""
    kind = None if like is None else _kind(like, "the first row")
    has_margin = (rows[0] if like is None else like).get("margin") is not None
    for number, row in enumerate(rows, start=first):
        where = f"row {number}"
        kind = kind or _kind(row, where)
        if _kind(row, where) != kind:
            raise ValueError(f"{where} has {_kind(row, where)}, expected {kind} as in the first row")
        margin = row.get("margin")
        if like is None and (margin is not None) != has_margin:
            raise ValueError(
                f"{where} has {'no' if margin is None else 'a'} margin, expected one in every row or in none"
            )
        if margin is not None:
            _check_margin(margin, where)


def _kind(row: Row, where: str) -> str:
    for column in ("chosen", "rejected"):
        if row.get(column) is None:
            raise ValueError(f"{where} has no {column!r}, expected a text or a conversation; it has {', '.join(row)}")
        if type(row[column]) not in KINDS:
            raise ValueError(
                f"{column!r} of {where} is {type(row[column]).__name__}, expected a text or a conversation"
            )
    prompt, chosen, rejected = (KINDS.get(type(row.get(name)), "?") for name in ("prompt", "chosen", "rejected"))
    if chosen != rejected or prompt not in (chosen, KINDS[type(None)]):
        raise ValueError(
            f"{where} has {prompt} as prompt, {chosen} as chosen and {rejected} as rejected, expected all texts or all conversations"
        )
    for column in ("prompt", "chosen", "rejected"):
        for message in row[column] if isinstance(row.get(column), list) else ():
            if not isinstance(message, Mapping) or not {str} == {type(message.get(k)) for k in ("role", "content")}:
                raise ValueError(
                    f"{column!r} of {where} has the message {message!r}, expected texts 'role' and 'content'"
                )
    return f"{chosen} as chosen and as rejected and {prompt} as prompt"


def _check_margin(margin: Any, where: str) -> None:
    if isinstance(margin, str):
        raise ValueError(
            f"the margin of {where} is the text {margin!r}, expected a number: data.columns={{margin: float}} reads it"
        )
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < math.inf:
        raise ValueError(f"the margin of {where} is {margin!r}, expected a finite number >= 0")


class _Reader:
    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_tokens: int, vocab_size: int, note: Callable[[str], None]
    ) -> None:
        self._tokenizer, self._max_tokens, self._vocab_size, self._note = tokenizer, max_tokens, vocab_size, note

    def __call__(self, rows: Sequence[Row], first: int, what: str) -> list[Preference]:
        """The pairs that something can be learned from."""
        pairs = [self._pair(row, f"row {number}") for number, row in enumerate(rows, start=first)]
        different = [pair for pair in pairs if pair.chosen_ids != pair.rejected_ids]
        fitting = [p for p in different if max(len(p.chosen_ids), len(p.rejected_ids)) <= self._max_tokens]
        self._left_out(len(pairs) - len(different), len(pairs), what, "chosen and rejected are the same")
        self._left_out(len(different) - len(fitting), len(pairs), what, f"longer than {self._max_tokens} tokens")
        if not fitting:
            raise ValueError(
                f"none of the {len(pairs)} {what} is left: in {len(pairs) - len(different)} of them chosen and rejected are the same, "
                f"{len(different)} are longer than {self._max_tokens} tokens"
            )
        ways = {(tuple(pair.chosen_ids), tuple(pair.rejected_ids)) for pair in fitting}
        if both := sum((rejected, chosen) in ways for chosen, rejected in ways) // 2:
            self._note(f"{both} of the {what} stand there the other way round too: one of each two is wrong")
        return fitting

    def _left_out(self, count: int, of: int, what: str, why: str) -> None:
        if count:
            self._note(f"left out {count} of {of} {what}: {why}")

    def _pair(self, row: Row, where: str) -> Preference:
        chosen, rejected = row["chosen"], row["rejected"]
        prompt = row.get("prompt") or type(chosen)()
        ids = [self._encode(prompt, answer, where) for answer in (chosen, rejected)]
        margin = row.get("margin")
        return Preference(prompt, chosen, rejected, *ids, None if margin is None else float(margin))

    def _encode(self, prompt: Text, answer: Text, where: str) -> list[int]:
        try:
            ids = encode_answered(self._tokenizer, prompt, answer)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if not ids or max(ids) >= self._vocab_size:
            raise ValueError(
                f"{where} has no token, or one with an id that is not below {self._vocab_size}, the rows of the model's embedding: take the "
                "tokenizer that belongs to the model"
            )
        return ids
