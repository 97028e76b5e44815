"""From rows to examples: prompts as PPO reads them, what is to be said after them, and the end of it."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from fastppo.data.chat import plain_messages
from fastppo.data.sources import Row
from fastppo.data.template import PromptTemplate
from fastppo.data.writer import PromptWriter
from fastppo.model import encode_prompt
from fastppo.model.endings import find_turn_end
from fastppo.sft_config import ExamplesConfig

MESSAGES = "messages"


class Example(NamedTuple):
    """A sequence of tokens, some of which are to be imitated."""

    tokens: array[int]
    targets: array[int]
    """The places of those, in rising order; the first token is never one, and there is at least one."""
    row: int
    """Number of its row in the source."""


Pieces = list[tuple[str, bool]]
"""Texts side by side, and whether each is to be imitated."""


class ExampleWriter:
    """Makes examples of rows. Raises ValueError for settings that do not fit each other, the columns or the tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: ExamplesConfig, columns: list[str]) -> None:
        self._tokenizer, self._config = tokenizer, config
        own_completion = config.completion_template != ExamplesConfig.completion_template or "completion" in columns
        self._conversations = MESSAGES in columns and not own_completion
        prompts = config.prompts()
        if self._conversations:
            prompts = replace(prompts, prompt_template=f"{{{MESSAGES}}}")
        self._prompts = PromptWriter(tokenizer, prompts, columns)
        if self._conversations and self._prompts.chat is None:
            raise ValueError(
                f"the data have conversations (column {MESSAGES!r}), which cannot be read because {self._prompts.why_no_chat()}"
            )
        self._completion = (
            None if self._conversations else PromptTemplate(config.completion_template, columns, "completion")
        )
        self._turn_end = find_turn_end(tokenizer) if self._prompts.chat or config.rendered else None
        self._stop = None if self._turn_end is None else self._turn_end.token
        if self._stop is None and tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no end of sequence, expected one, with which the model learns to end its completions: set "
                "tokenizer.eos_token and save it"
            )

    def __call__(self, row: Row, number: int) -> list[Example]:
        """One, or one for each of the assistant's turns where the chat template writes the past otherwise as a conversation goes on. Raises
        ValueError, naming the row by its number, where it makes none."""
        if self._conversations:
            messages, first = self._messages(row[MESSAGES], number, MESSAGES), 0
        else:
            written = self._prompts(row, number)
            if self._prompts.chat is None:
                return [self._of_texts(written, self._completion(row, number), number)]
            prompt = written["prompt"]
            before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            messages, first = before + self._answer(row, number), len(before)
        turns = self._turns(messages, first, row, number)
        return [self._encode(pieces, number) for pieces in self._joined(turns)]

    def finish(self) -> None:
        """Raises ValueError, and warns, as `PromptWriter.finish` does."""
        self._prompts.finish()

    def _of_texts(self, written: Row, completion: str, number: int) -> Example:
        prompt, name, end = written["prompt_ids"], self._tokenizer.eos_token, self._tokenizer.eos_token_id
        example = self._encode([(completion, True)], number, written["prompt"], prompt, bool(self._config.rendered))
        if name is not None and name in written["prompt"] and self._config.rendered is None:
            raise ValueError(
                f"the prompt of row {number} has the end of sequence {name!r} in it, expected none: set data.rendered to true for texts that "
                "are to be read as they stand, to false for texts like any other"
            )
        if end in example.tokens[len(prompt) : -1]:
            raise ValueError(
                f"the completion of row {number} has the end of sequence {name!r} before its own end, after which the model would say nothing "
                "more, expected it at the end or not at all"
            )
        return example

    def _answer(self, row: Row, number: int) -> list[Row]:
        """The completion as messages."""
        only = self._completion.only_column
        if only is not None and isinstance(row[only], list):
            return self._messages(row[only], number, "completion")
        return [{"role": "assistant", "content": self._completion(row, number)}]

    def _messages(self, value: object, number: int, what: str) -> list[Row]:
        """A conversation that ends with the assistant's turn."""
        if not isinstance(value, list):
            raise ValueError(f"{what!r} of row {number} is {type(value).__name__}, expected a list of messages")
        messages = plain_messages(value, number, what)
        if messages[-1]["role"] != "assistant":
            raise ValueError(
                f"{what!r} of row {number} ends with a message of the role {messages[-1]['role']!r}, expected the assistant's to learn from"
            )
        return messages

    def _turns(self, messages: list[Row], first: int, row: Row, number: int) -> Iterator[tuple[str, str]]:
        """(all that stands before it, what it says) of the assistant's turns from message `first` on."""
        given = self._prompts.for_template(row, number)
        for index, message in enumerate(messages):
            if index < first or message["role"] != "assistant":
                continue
            if index == 0:
                raise ValueError(
                    f"the conversation of row {number} begins with the assistant's turn, expected one before it"
                )
            if not message.get("content", "").strip() and not message.get("tool_calls"):
                raise ValueError(f"message {index} of the conversation of row {number} is empty: {message!r}")
            before = self._prompts.chat(messages[:index], number, *given)
            after = self._prompts.chat(messages[: index + 1], number, *given, begin_turn=False)
            if not after.startswith(before):
                raise ValueError(
                    f"the chat template writes message {index} of the conversation of row {number} otherwise than it begins the assistant's "
                    f"turn: after {before[-40:]!r} nothing of {after[-80:]!r} can be said"
                )
            yield before, self._said(after[len(before) :], index, number)

    def _said(self, text: str, index: int, number: int) -> str:
        """Up to and with the token that ends the turn: sampling stops there."""
        if self._stop is None:
            return text
        end = str(self._tokenizer.added_tokens_decoder[self._stop])
        said, found, rest = text.partition(end)
        if not found or (found + rest).strip() != self._turn_end.text[self._turn_end.text.index(end) :]:
            raise ValueError(
                f"message {index} of the conversation of row {number} ends with {text[-40:]!r}, expected the chat template's own end of a turn, "
                f"{self._turn_end.text!r}, once"
            )
        return said + found

    def _joined(self, turns: Iterator[tuple[str, str]]) -> list[Pieces]:
        """Turns as one sequence where each goes on from the one before; a turn that no token ends is the last of its sequence."""
        sequences: list[Pieces] = []
        text = None
        for before, said in turns:
            if text is None or self._stop is None or not before.startswith(text):
                sequences.append([])
                text = ""
            sequences[-1] += [(before[len(text) :], False), (said, True)]
            text = before + said
        return sequences

    def _encode(
        self, pieces: Pieces, number: int, text: str = "", tokens: Sequence[int] = (), rendered: bool = True
    ) -> Example:
        """The pieces after `text`, of which there are `tokens`. A border between pieces is one between tokens: what follows a prompt is sampled
        after the prompt's own tokens."""
        tokens, targets = list(tokens), []
        try:
            for piece, is_learned in pieces:
                text += piece
                whole = encode_prompt(self._tokenizer, text, rendered=rendered)
                fits = whole[: len(tokens)] == tokens
                new = whole[len(tokens) :] if fits else encode_prompt(self._tokenizer, piece, rendered=True)
                targets += range(len(tokens), len(tokens) + len(new)) if is_learned else ()
                tokens += new
        except Exception as error:  # the tokenizers library raises nothing more precise
            raise ValueError(f"the tokenizer cannot encode row {number}: {error}") from error
        if not targets or targets[0] == 0:
            raise ValueError(f"the tokenizer makes no token of the prompt or of the completion of row {number}")
        end = self._tokenizer.eos_token_id
        if tokens[-1] not in (self._stop, end):
            targets.append(len(tokens))
            tokens.append(self._stop if end is None else end)
        return Example(array("i", tokens), array("i", targets), number)
