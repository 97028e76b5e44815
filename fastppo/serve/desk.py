"""Between tickets and the sequences of a session: which turn answers which, and what the client is told of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from fastppo.rollout import FinishReason, Session, Turn
from fastppo.serve.request import Message, RequestError
from fastppo.serve.ticket import Begun, Done, Piece, Reply, Ticket

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a character is decoded to while some of its bytes are missing."""


class Speech(Protocol):
    """Between messages and tokens; `fastppo.envs.Dialogue` is one."""

    def conversation(self, messages: list[Message], tools: Sequence[dict[str, Any]]) -> list[int]:
        """What the policy reads when it is to answer. Raises ValueError where the chat template refuses it."""
        ...

    def said(self, tokens: Sequence[int]) -> str:
        """The text of a turn, without special tokens."""
        ...

    def message(self, past: Sequence[int], tokens: Sequence[int], tools: Sequence[dict[str, Any]]) -> Message:
        """A turn after the ids `past`, with `content`, `tool_calls` where it calls some, and `parse_error` where it cannot be read."""
        ...

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        """Of each token, special ones included."""
        ...


class Answered(NamedTuple):
    """A ticket all of whose choices are whole."""

    ticket: Ticket
    sequences: list[int]
    """Of the choices, in their order."""
    replies: list[Reply]
    past: list[int]
    """Token ids before the answers."""


@dataclass
class _Served:
    """A ticket that is being answered."""

    ticket: Ticket
    past: list[int]
    sequences: list[int]
    texts: list[_GrowingText]
    replies: dict[int, Reply] = field(default_factory=dict)


class Desk:
    """Books of one session. It belongs to the thread that samples; `heard` is for the session's `on_tokens`."""

    def __init__(self, speech: Speech) -> None:
        self._speech = speech
        self._served: dict[int, _Served] = {}  # by sequence

    def begin(self, ticket: Ticket, sequences: list[int], past: list[int]) -> None:
        """The turns under way of `sequences`, which follow upon the ids `past`, are the choices that the ticket asked for."""
        request = ticket.request
        told_as_it_grows = request.stream and not request.tools  # calls can be read only when they are whole
        texts = [_GrowingText(self._speech.said, request.stop if told_as_it_grows else None) for _ in sequences]
        served = _Served(ticket, past, sequences, texts)
        self._served |= dict.fromkeys(sequences, served)
        ticket.tell(Begun())

    def heard(self, news: list[tuple[int, int]]) -> None:
        """New tokens as (sequence, token)."""
        for sequence, token in news:
            served = self._served.get(sequence)
            if served is not None:
                choice = served.sequences.index(sequence)
                if text := served.texts[choice].grown(token):
                    served.ticket.tell(Piece(choice, text))

    def answered(self, turn: Turn, session: Session) -> Answered | None:
        """What the turn has completed, of which the client has been told; None while other choices go on, and where the logits were not finite."""
        served = self._served.pop(turn.id)
        if turn.finish_reason == FinishReason.ERROR:
            served.ticket.tell(RequestError("the model's logits were NaN or infinite", status=500))
            served.ticket.gone = True
            return None
        choice = served.sequences.index(turn.id)
        chances = session.logprobs(turn.id) if served.ticket.request.logprobs else None
        served.replies[choice] = self._reply(served, choice, turn, chances)
        if len(served.replies) < len(served.sequences):
            return None
        replies = [served.replies[i] for i in range(len(served.sequences))]
        served.ticket.tell(Done(replies, len(served.past)))
        return Answered(served.ticket, served.sequences, replies, served.past)

    def gone(self) -> list[int]:
        """Sequences whose clients no longer wait."""
        return [sequence for sequence, served in self._served.items() if served.ticket.gone]

    def refuse_all(self, error: RequestError) -> None:
        """Tell everyone who waits."""
        for ticket in {id(served): served.ticket for served in self._served.values()}.values():
            ticket.tell(error)
        self._served.clear()

    def _reply(self, served: _Served, choice: int, turn: Turn, chances: list[float] | None) -> Reply:
        request, said = served.ticket.request, self._speech.said(turn.tokens)
        content, reasoning, calls = said, "", []
        if request.tools:
            message = self._speech.message(served.past, turn.tokens, request.tools)
            found = _calls(message.get("tool_calls") or [])
            if "parse_error" not in message and found is not None:
                content, reasoning, calls = message["content"] or "", message.get("thinking") or "", found
        content = before_stop(content, request.stop)
        reason = "tool_calls" if calls else "stop" if turn.finish_reason == FinishReason.STOP else "length"
        texts = None if chances is None else self._speech.token_texts(turn.tokens)
        pairs = None if texts is None else list(zip(texts, chances, strict=True))
        rest = content[served.texts[choice].told :]
        return Reply(choice, turn.tokens, content, reasoning, calls, reason, pairs, rest)


class _GrowingText:
    """The text of a turn while it is being sampled, as far as nothing that is still to come can change it."""

    def __init__(self, said: Callable[[Sequence[int]], str], stop: tuple[str, ...] | None) -> None:
        """stop: texts that end the turn, of which nothing is told; None tells nothing at all."""
        self._said, self._stop = said, stop
        self._tokens: list[int] = []
        self._shown = ""  # the text of the first of them, which has been taken
        self._held = ""  # text that may be the beginning of a stop
        self.told = 0  # characters

    def grown(self, token: int) -> str:
        """What can be told since `token` came."""
        if self._stop is None:
            return ""
        self._tokens.append(token)
        text = self._said(self._tokens)
        if text.endswith(UNFINISHED):
            return ""
        self._held += text[len(self._shown) :]
        self._tokens = self._tokens[-1:]
        self._shown = self._said(self._tokens)
        cut = before_stop(self._held, self._stop)
        if len(cut) < len(self._held):
            self._stop, self._held = None, ""
            self.told += len(cut)
            return cut
        sure = len(self._held) - max((len(text) - 1 for text in self._stop), default=0)
        new, self._held = self._held[: max(sure, 0)], self._held[max(sure, 0) :]
        self.told += len(new)
        return new


def before_stop(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the texts `stop` in it."""
    return text[: min((text.find(end) for end in stop if end in text), default=len(text))]


def _calls(calls: Sequence[Any]) -> list[dict[str, Any]] | None:
    """What the model's calls say; None where one of them is none."""
    functions = [call.get("function", call) if isinstance(call, dict) else {} for call in calls]
    if not all(isinstance(function.get("name"), str) for function in functions):
        return None
    return [{"name": f["name"], "arguments": f.get("arguments") or {}} for f in functions]
