"""The tokenizer's chat template, and the conversations that it renders."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from fastppo.data.files import parse_json
from fastppo.data.sources import Row

PROBE = [
    {"role": "user", "content": "a question"},
    {"role": "assistant", "content": "an answer"},
    {"role": "user", "content": "one more question"},
]
PROBE_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "a tool", "parameters": {"type": "object", "properties": {}}},
}
TEMPLATE_COLUMNS = {"tools": list, "chat_template_kwargs": dict}
"""Columns of a row that its chat template gets, and their types; a JSON text of such a value will do."""


class ChatTemplate:
    """Renders conversations into the text that a model reads, by default its own turn begun. `system_prompt` becomes their first message."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> None:
        self._tokenizer, self._system_prompt = tokenizer, system_prompt

    def __call__(
        self,
        messages: list[Row],
        number: int,
        tools: list | None = None,
        options: Row | None = None,
        *,
        begin_turn: bool = True,
    ) -> str:
        """`tools` and `options` go to the template; `begin_turn`: the model is to speak next. Raises ValueError, naming the row by its number,
        where the template refuses it."""
        if self._system_prompt is not None and messages[0]["role"] == "system":
            raise ValueError(
                f"system_prompt is set, but the conversation of row {number} begins with a system message of its own"
            )
        try:
            return self.render(messages, tools, options, begin_turn=begin_turn)
        except Exception as error:  # a template is a program that raises what it likes
            raise ValueError(f"the tokenizer's chat template refuses the prompt of row {number}: {error}") from error

    def render(
        self, messages: list[Row], tools: list | None = None, options: Row | None = None, *, begin_turn: bool = True
    ) -> str:
        """Raises what the template raises. begin_turn: the model's own turn is begun at the end."""
        system = [] if self._system_prompt is None else [{"role": "system", "content": self._system_prompt}]
        return self._render(system + messages, tools, options, begin_turn)

    def mark_in(self, text: str) -> str | None:
        """What shows that a text was rendered already: a special token that the template writes, or at the text's end what it writes after
        the last message. None for a text that shows neither."""
        tokens, end = self._marks
        if end and text.rstrip().endswith(end):
            return end
        return next((token for token in tokens if token in text), None)

    def _render(
        self, messages: list[Row], tools: list | None = None, options: Row | None = None, begin_turn: bool = True
    ) -> str:
        return self._tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=begin_turn, tokenize=False, **options or {}
        )

    @functools.cached_property
    def _marks(self) -> tuple[list[str], str]:
        added = [str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        special = list(dict.fromkeys([*self._tokenizer.all_special_tokens, *added]))
        try:
            rendered = self._render(PROBE)
        except Exception:  # a template of other roles: each special token counts
            return special, ""
        _, question, end = rendered.rpartition(PROBE[-1]["content"])
        tells = question and any(map(str.isalnum, end))  # texts may end with a template's quote or full stop
        return [token for token in special if token in rendered], end.strip() if tells else ""

    @functools.cached_property
    def shows_tools(self) -> bool:
        try:
            return self._render(PROBE, [PROBE_TOOL]) != self._render(PROBE)
        except Exception:  # what the rows say will show
            return True


def template_column(value: Any, name: str, number: int) -> Any:
    """What a row has in the column `tools` or `chat_template_kwargs`; None where that is empty. Raises ValueError for another type."""
    if isinstance(value, str):
        try:
            value = parse_json(value) if value.strip() else None
        except ValueError as error:
            raise ValueError(
                f"{name} of row {number} is {value!r}, which is not JSON: {error} (a column of this name goes to the chat template)"
            ) from error
    if not value:
        return None
    if not isinstance(value, TEMPLATE_COLUMNS[name]):
        expected = TEMPLATE_COLUMNS[name].__name__
        raise ValueError(f"{name} of row {number} is {type(value).__name__}, expected a {expected}, or JSON of one")
    return value


def check_messages(messages: list[Any], number: int) -> list[Row]:
    """The messages of a prompt as plain JSON values. Raises ValueError naming row and message."""
    found = plain_messages(messages, number, "prompt")
    if found[-1]["role"] == "assistant":
        raise ValueError(
            f"the conversation of row {number} ends with the assistant's turn, expected one for it to answer"
        )
    return found


def plain_messages(messages: list[Any], number: int, what: str) -> list[Row]:
    """The messages as plain JSON values, without the empty entries that tables fill in. Raises ValueError naming row and message; `what` is the
    column's part in it."""
    if not messages:
        raise ValueError(f"the {what} of row {number} is a conversation without messages")
    for message in messages:
        if not isinstance(message, Mapping) or not _has_text(message, "role") or not _has_content(message):
            raise ValueError(
                f"the {what} of row {number} has the message {message!r}, expected a dict with texts 'role' and 'content'"
            )
    return [
        _plain(
            {key: value for key, value in message.items() if value is not None},
            f"message {index} of the conversation of row {number}",
        )
        for index, message in enumerate(messages)
    ]


def _has_text(message: Mapping[str, Any], key: str) -> bool:
    return isinstance(message.get(key), str)


def _has_content(message: Mapping[str, Any]) -> bool:
    return _has_text(message, "content") or message.get("content") is None and bool(message.get("tool_calls"))


def _plain(value: Any, where: str) -> Any:
    """The value as JSON holds it, so that records of the run can: NumPy's numbers become Python's. Raises ValueError for what JSON lacks."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{where}, {key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    if isinstance(value, float) and not np.isfinite(value) or not isinstance(value, str | int | float | None):
        raise ValueError(
            f"{where} is {value!r} ({type(value).__name__}), expected what JSON holds (texts, numbers, null, lists, objects)"
        )
    return value
