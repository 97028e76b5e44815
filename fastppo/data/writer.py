"""From rows to prompts: the prompt template, then the chat template, then the tokenizer."""

from __future__ import annotations

import logging

from transformers import PreTrainedTokenizerBase

from fastppo.data.chat import TEMPLATE_COLUMNS, ChatTemplate, check_messages, template_column
from fastppo.data.sources import Row
from fastppo.data.template import PromptTemplate
from fastppo.model import encode_prompt
from fastppo.recipe_config import DataConfig

logger = logging.getLogger(__name__)


class PromptWriter:
    """Adds `prompt` and `prompt_ids` to rows. Raises ValueError for settings that do not fit each other or the tokenizer.

    `chat` renders conversations; None where no chat template is applied, for the reason that `why_no_chat` gives.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig, columns: list[str]) -> None:
        self._tokenizer, self._config = tokenizer, config
        self._template = PromptTemplate(config.prompt_template, columns)
        self.chat = _chat_template(tokenizer, config)
        self._template_columns = [n for n in TEMPLATE_COLUMNS if n in columns and not self._template.names(n)]
        self._first_of_kind: dict[str, int] = {}
        self._unused: dict[str, str] = {}

    def __call__(self, row: Row, number: int) -> Row:
        """Raises ValueError, naming the row by its number, where it makes no prompt."""
        only = self._template.only_column
        conversation = only is not None and isinstance(row[only], list)
        self._first_of_kind.setdefault("a conversation" if conversation else "a text", number)
        prompt = check_messages(row[only], number) if conversation else self._template(row, number)
        text = self._render(prompt, row, number)
        ids = self._encode(text, number)
        if not conversation and self._config.rendered is None:
            self._refuse_rendered(prompt, ids, number)
        return row | {"prompt": prompt, "prompt_ids": ids}

    def finish(self) -> None:
        """Raises ValueError unless all prompts are of one kind, as reward functions take them. Warns of columns that reached no prompt."""
        if len(self._first_of_kind) > 1:
            found = " and ".join(f"{kind} (row {number})" for kind, number in self._first_of_kind.items())
            raise ValueError(f"the prompts are of two kinds, {found}: expected all texts or all conversations")
        for column, why in self._unused.items():
            logger.warning("the column %r reaches no prompt: %s", column, why)

    def _render(self, prompt: str | list[Row], row: Row, number: int) -> str:
        """What the model reads, as text."""
        if self.chat is None:
            if isinstance(prompt, list):
                raise ValueError(
                    f"the prompt of row {number} is a conversation, expected a text because {self.why_no_chat()}"
                )
            if not self._config.rendered:
                self._unused |= {name: self.why_no_chat() for name in self._template_columns if row[name]}
            return prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.chat(messages, number, *self.for_template(row, number))

    def for_template(self, row: Row, number: int) -> tuple[list | None, Row | None]:
        """What a row has for the chat template besides messages: (tools, options)."""
        given = {name: template_column(row[name], name, number) for name in self._template_columns}
        tools = given.get("tools")
        if tools and not self.chat.shows_tools:
            self._unused["tools"] = "the tokenizer's chat template has no place for them"
        return tools, given.get("chat_template_kwargs")

    def why_no_chat(self) -> str:
        if self._config.rendered:
            return "rendered is true"
        return "chat is off" if self._tokenizer.chat_template else "the tokenizer has no chat template"

    def _encode(self, text: str, number: int) -> list[int]:
        rendered = self.chat is not None or bool(self._config.rendered)
        try:
            ids = encode_prompt(self._tokenizer, text, rendered=rendered)
        except Exception as error:  # the tokenizers library raises nothing more precise
            raise ValueError(f"the tokenizer cannot encode the prompt of row {number}: {error}") from error
        if not ids:
            raise ValueError(f"the tokenizer makes no token of the prompt of row {number}: {text!r}")
        return ids

    def _refuse_rendered(self, prompt: str, ids: list[int], number: int) -> None:
        if self.chat is not None:
            mark, again = self.chat.mark_in(prompt), "it would be applied a second time"
        else:
            mark, again = self._doubled_beginning(prompt, ids), "the tokenizer adds another"
        if mark is not None:
            raise ValueError(
                f"the prompt of row {number} has {mark!r}, as if the chat template had been applied to it already, and {again}: set rendered "
                "to true for texts that are to be read as they stand, to false for texts like any other (data.rendered in a recipe; for "
                "PPOTrainer, prompts=load_prompts(..., tokenizer, DataConfig(rendered=...)))"
            )

    def _doubled_beginning(self, prompt: str, ids: list[int]) -> str | None:
        """The beginning of sequence, where the text has it and the tokenizer has put one more before it."""
        begin = self._tokenizer.bos_token
        doubled = ids[:2] == [self._tokenizer.bos_token_id] * 2
        return begin if doubled and prompt.lstrip().startswith(begin) else None


def _chat_template(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> ChatTemplate | None:
    available = bool(getattr(tokenizer, "chat_template", None))
    if config.chat and config.rendered:
        raise ValueError("chat and rendered are both true, but the chat template is not applied to rendered texts")
    if config.chat and not available:
        raise ValueError("chat is true, but the tokenizer has no chat template")
    chat = not config.rendered and (available if config.chat is None else config.chat)
    if config.system_prompt is not None and not chat:
        raise ValueError("system_prompt is set, but no chat template is applied that would have a place for it")
    return ChatTemplate(tokenizer, config.system_prompt) if chat else None
