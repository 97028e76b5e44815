"""From rows to prompt texts: the prompt template, then the chat template."""

from __future__ import annotations

import difflib
import string
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastppo.config import DataConfig
from fastppo.data.sources import Row


class PromptWriter:
    """Adds `prompt` to rows and collects the texts to tokenize."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig, chat: bool, columns: list[str]) -> None:
        self._tokenizer, self._chat, self._system_prompt = tokenizer, chat, config.system_prompt
        self._pieces = _parse_template(config.prompt_template, columns)
        self.texts: list[str] = []
        self._first_of_kind: dict[str, int] = {}

    def __call__(self, row: Row, number: int) -> Row:
        only = self._pieces[0][1] if len(self._pieces) == 1 and not self._pieces[0][0] else None
        conversation = only is not None and isinstance(row[only], list)
        self._first_of_kind.setdefault("a conversation" if conversation else "a text", number)
        if conversation:
            messages = _check_messages(row[only], number)
            self.texts.append(self._render(messages, number))
            return row | {"prompt": messages}
        text = "".join(literal + _field(row, column, number) for literal, column in self._pieces)
        if not text.strip():
            raise ValueError(f"the prompt of row {number} is empty: {text!r}")
        self.texts.append(self._render([{"role": "user", "content": text}], number) if self._chat else text)
        return row | {"prompt": text}

    def require_one_kind(self) -> None:
        """Reward functions take all prompts as texts or all as conversations."""
        if len(self._first_of_kind) > 1:
            found = " and ".join(f"{kind} (row {number})" for kind, number in self._first_of_kind.items())
            raise ValueError(f"the prompts are of two kinds, {found}: expected all texts or all conversations")

    def _render(self, messages: list[Row], number: int) -> str:
        if not self._chat:
            raise ValueError(
                f"the prompt of row {number} is a conversation, expected a text because "
                + ("chat is off" if self._tokenizer.chat_template else "the tokenizer has no chat template")
            )
        if self._system_prompt is not None and messages[0]["role"] == "system":
            raise ValueError(
                f"system_prompt is set, but the conversation of row {number} begins with a system message of its own"
            )
        system = [] if self._system_prompt is None else [{"role": "system", "content": self._system_prompt}]
        try:
            return self._tokenizer.apply_chat_template(system + messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program that raises what it likes
            raise ValueError(f"the tokenizer's chat template refuses the prompt of row {number}: {error}") from error


def use_chat_template(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> bool:
    available = bool(getattr(tokenizer, "chat_template", None))
    if config.chat and not available:
        raise ValueError("chat is true, but the tokenizer has no chat template")
    chat = available if config.chat is None else config.chat
    if config.system_prompt is not None and not chat:
        raise ValueError("system_prompt is set, but no chat template is applied that would have a place for it")
    return chat


def _parse_template(template: str, columns: list[str]) -> list[tuple[str, str | None]]:
    """[(literal text, column that follows it or None)]; only plain `{column}` fields of known columns pass."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"prompt_template is {template!r}: {error} (a brace that stands for itself is doubled)"
        ) from error
    for _, column, options, conversion in parts:
        if column is not None and (options or conversion or not column):
            raise ValueError(
                f"prompt_template is {template!r}, expected plain fields such as {{prompt}}, without options"
            )
        if column is not None and column not in columns:
            close = difflib.get_close_matches(column, columns, n=1)
            hint = f" (did you mean {{{close[0]}}}?)" if close else ""
            raise ValueError(
                f"prompt_template names the column {column!r}{hint}, expected one of the data's: {', '.join(map(repr, columns))}"
            )
    return [(literal, column) for literal, column, _, _ in parts]


def _field(row: Row, column: str | None, number: int) -> str:
    value = "" if column is None else row[column]
    if isinstance(value, str | int | float):
        return str(value)
    raise ValueError(f"column {column!r} of row {number} is {type(value).__name__}, expected a text or a number")


def _check_messages(messages: list[Any], number: int) -> list[Row]:
    """The messages without the empty entries that tables fill in."""
    if not messages:
        raise ValueError(f"the prompt of row {number} is a conversation without messages")
    for message in messages:
        fits = isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not fits:
            raise ValueError(
                f"the prompt of row {number} has the message {message!r}, expected a dict with texts 'role' and 'content'"
            )
    if messages[-1]["role"] == "assistant":
        raise ValueError(
            f"the conversation of row {number} ends with the assistant's turn, expected one for it to answer"
        )
    return [{key: value for key, value in message.items() if value is not None} for message in messages]
