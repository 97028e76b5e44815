"""A request on its way from the server's thread to the one that samples, and what is told of it on the way back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastppo.serve.request import ChatRequest, RequestError


class Begun(NamedTuple):
    """It is being sampled."""


class Piece(NamedTuple):
    """More text of a choice."""

    choice: int
    text: str


class Reply(NamedTuple):
    """A choice that is whole."""

    choice: int
    tokens: list[int]
    """Those that the policy chose, with the one that ended it."""
    content: str
    reasoning: str
    """What the model's own format keeps apart as thoughts."""
    tool_calls: list[dict[str, Any]]
    """Each with `name` and `arguments` (an object, or the text that the model wrote)."""
    finish_reason: str
    """`stop`, `length` or `tool_calls`"""
    logprobs: list[tuple[str, float]] | None
    """(text, log-prob) of each token, where they were asked for."""
    rest: str
    """Of `content`, what no `Piece` has told."""


class Done(NamedTuple):
    """All choices are whole."""

    replies: Sequence[Reply]
    prompt_tokens: int


Event = Begun | Piece | Done | RequestError


@dataclass(eq=False)
class Ticket:
    """A request, and the way back to the one who waits for it."""

    request: ChatRequest
    owner: Any
    """Whose it is, as the server's `admit` said."""
    loop: asyncio.AbstractEventLoop
    """Of the server's thread."""
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    gone: bool = False
    """The client has closed the connection before it had its answer."""

    def tell(self, event: Event) -> None:
        """From any thread."""
        with suppress(RuntimeError):  # the server is closed, and nobody waits
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
