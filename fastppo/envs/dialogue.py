"""Between tokens and texts: what an environment says as token ids that follow upon those that are there, which are never made again."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase

from fastppo.data.chat import ChatTemplate, template_column
from fastppo.envs.environment import TOOL, Message, Observation
from fastppo.model import encode_prompt
from fastppo.model.decoding import decode, token_texts
from fastppo.model.endings import ANSWER, find_turn_end

QUESTION = {"role": "user", "content": "The user's question."}
THOUGHT = "<think>\nA thought.\n</think>\n\n"

Schemas = Sequence[dict[str, Any]]


class Dialogue:
    """The text of episodes.

    Args:
        tokenizer: of the policy.
        chat: what rendered the prompts. Texts of an environment then are the user's messages; None appends them as they are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: ChatTemplate | None) -> None:
        self._tokenizer, self._chat, self._tools_are_fine = tokenizer, chat, False

    # What the policy reads

    def prompt(self, row: Mapping[str, Any], observation: Observation, tools: Schemas = ()) -> list[int]:
        """What the policy reads first: `observation` in place of the row's prompt, where there is one, and the tools. Raises as `check_tools`."""
        if observation is None and not tools:
            return row["prompt_ids"]
        if tools:
            self.check_tools()
        said = row["prompt"] if observation is None else observation
        if self._chat is None:
            return encode_prompt(self._tokenizer, self._text(said))
        return self._encode(self._chat.render(as_messages(said), list(tools) or None, _options(row)))

    def reply(self, row: Mapping[str, Any], last: int, observation: Observation) -> list[int]:
        """The ids that follow upon a turn: what closes it, as far as its `last` token has not, the observation, and what begins the next turn.

        Raises ValueError where the chat template refuses the messages, or writes what comes before them in another way because of them.
        """
        if self._chat is None:
            text = self._text(observation)
            return self._encode(text) if text else []
        return self._without(last, self._encode(self._after_answer(as_messages(observation), options=_options(row))))

    def _without(self, last: int, ids: list[int]) -> list[int]:
        """What closes a turn is not said twice."""
        return ids[1:] if ids[:1] == [last] == [self._turn_end] else ids

    # What it reads of conversations that are told from their beginning each time

    def conversation(self, messages: list[Message], tools: Schemas = ()) -> list[int]:
        """What the policy reads when it is to answer these messages. Raises ValueError where the chat template refuses them, and as `check_tools`."""
        return self._encode(self._rendered(messages, tools))

    def continuation(self, messages: list[Message], answered: int, last: int, tools: Schemas = ()) -> list[int] | None:
        """The ids that follow upon the policy's own answer, which is `messages[answered]` and whose last token was `last`, where the chat template
        leaves all up to there as it was when the policy read it; None where it writes that in another way because of what follows."""
        begun = self._rendered(messages[:answered], tools)
        before = self._rendered(messages[: answered + 1], tools, begin_turn=False)
        whole, end = self._rendered(messages, tools), before.rfind(self._closing)
        if end < 0 or not whole.startswith(begun) or not whole.startswith(before[:end] + self._closing):
            return None
        return self._without(last, self._encode(whole[end:]))

    def _rendered(self, messages: list[Message], tools: Schemas, *, begin_turn: bool = True) -> str:
        if tools:
            self.check_tools()
        if self._chat is None:
            raise ValueError("messages need a chat template, and there is none")
        try:
            return self._chat.render(messages, list(tools) or None, begin_turn=begin_turn)
        except Exception as error:  # a template is a program that raises what it likes
            raise ValueError(f"the chat template of {self._name} refuses the messages: {error}") from error

    # What the policy says

    def said(self, tokens: Sequence[int]) -> str:
        """The text of a turn, without special tokens."""
        return decode(self._tokenizer, tokens, skip_special_tokens=True)

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        """Of each token of a turn, special ones included."""
        return token_texts(self._tokenizer, tokens)

    def message(self, past: Sequence[int], tokens: Sequence[int], tools: Schemas) -> Message:
        """A turn as the assistant's message, with `content` and, where it calls tools, `tool_calls`; with `parse_error` where it cannot be read.

        past: all ids before the turn.
        """
        try:
            found = self._tokenizer.parse_response(
                list(tokens), self._response_template, prefix=list(past), tools=list(tools)
            )
        except Exception as error:  # the model wrote it, and Transformers' parsers raise what they like
            return {"role": "assistant", "content": self.said(tokens), "parse_error": str(error)}
        return {"content": ""} | found

    # What has to hold

    def check(self, role: str) -> None:
        """Raises ValueError unless the chat template leaves earlier turns as they are when a message of `role` follows."""
        for thought in ("", THOUGHT):
            self._after_answer([{"role": role, "name": "f", "content": "One more message."}], thought + ANSWER)

    def check_tools(self) -> None:
        """Raises ValueError unless the policy can read what tools there are, call them and read their answers."""
        if self._tools_are_fine:
            return
        if self._chat is None:
            raise ValueError("tools need prompts that a chat template renders, and these were not")
        if not self._chat.shows_tools:
            raise ValueError(f"the chat template of {self._name} has no place for tools, expected one that has")
        self.check(TOOL)
        self._tools_are_fine = bool(self._response_template)

    @cached_property
    def _response_template(self) -> dict[str, Any]:
        """How the model's calls are read: the tokenizer's own, or TRL's for a chat template that it knows."""
        if "tools" not in inspect.signature(self._tokenizer.parse_response).parameters:
            raise ValueError(
                f"Transformers is {transformers.__version__}, expected at least 5.15, which can read calls of tools"
            )
        hint = "set tokenizer.response_template (Transformers' chat response parsing) to say how tool calls are read"
        own = getattr(self._tokenizer, "response_template", None)
        if own is not None:
            return own
        try:
            from trl.chat_template_utils import add_response_schema
        except ImportError as error:
            raise ValueError(
                f"{self._name} has no response_template, and trl, which has many, is missing: {hint}"
            ) from error
        try:
            return add_response_schema(copy.copy(self._tokenizer)).response_template
        except ValueError as error:
            raise ValueError(f"{self._name} has no response_template, and trl knows none for it: {hint}") from error

    # The template

    @cached_property
    def _turn_end(self) -> int | None:
        """The token that closes the assistant's turn."""
        found = find_turn_end(self._tokenizer)
        return None if found is None else found.token

    @cached_property
    def _closing(self) -> str:
        """The text of that token, "" where there is none."""
        return "" if self._turn_end is None else self._tokenizer.decode([self._turn_end])

    @property
    def _name(self) -> str:
        return self._tokenizer.name_or_path or type(self._tokenizer).__name__

    def _after_answer(
        self, messages: list[Message], answer: str = ANSWER, options: Mapping[str, Any] | None = None
    ) -> str:
        """What the template writes from the end of the assistant's turn on, when `messages` follow upon it."""
        past = [QUESTION, {"role": "assistant", "content": answer} | _calls_for(messages)]
        try:
            before = self._chat.render(past, options=options, begin_turn=False)
            whole = self._chat.render([*past, *messages], options=options)
        except Exception as error:  # a template is a program that raises what it likes
            raise ValueError(f"the chat template of {self._name} refuses the messages {messages!r}: {error}") from error
        end = self._end_of_turn(before)
        if end is None or not whole.startswith(before[:end] + self._closing):
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages)) or "none"
            raise ValueError(
                f"the chat template of {self._name} rewrites an earlier turn when messages follow (roles: {roles}), expected one that leaves it as "
                f"it was: the policy would be trained on another conversation than it is used in. It wrote {before!r}, then {whole!r} "
                f"(trl.chat_template_utils.get_training_chat_template has some that do)"
            )
        return whole[end:]

    def _end_of_turn(self, rendered: str) -> int | None:
        """Where the last assistant's turn, its calls included, ends in what the template wrote; None where its answer is not there."""
        if ANSWER not in rendered:
            return None
        after = rendered.rindex(ANSWER) + len(ANSWER)
        return max(rendered.rfind(self._closing), after) if self._closing else after

    def _encode(self, text: str) -> list[int]:
        return encode_prompt(self._tokenizer, text, rendered=True)

    def _text(self, observation: Observation) -> str:
        if isinstance(observation, list):
            raise ValueError(
                "an observation is messages, expected a text: the prompts were not rendered by a chat template"
            )
        return observation or ""


def as_messages(observation: Observation) -> list[Message]:
    """A text as the user's message."""
    return [{"role": "user", "content": observation or ""}] if not isinstance(observation, list) else observation


def _calls_for(messages: list[Message]) -> dict[str, Any]:
    """The calls that answers of tools follow upon, which some templates want to see."""
    names = [message.get("name", "f") for message in messages if message["role"] == TOOL]
    calls = [{"type": "function", "function": {"name": name, "arguments": {}}} for name in names]
    return {"tool_calls": calls} if calls else {}


def _options(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Those of the row for its chat template."""
    return template_column(row.get("chat_template_kwargs"), "chat_template_kwargs", 0)
