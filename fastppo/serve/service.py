"""Answers to whoever asks: requests join the turns that are being sampled, and leave when they are answered."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import replace
from queue import Empty, SimpleQueue

from fastppo.rollout import Engine, SamplingParams, Session
from fastppo.serve.desk import Desk, Speech
from fastppo.serve.request import ChatRequest, RequestError
from fastppo.serve.ticket import Ticket

TICK = 0.1  # seconds at most between looks at whether the service is to end
MOST_SEQUENCES = 4096
"""Of a session, which remembers every token: the next ones get a session of their own when these are answered."""


class ChatService:
    """Takes tickets from an inbox and samples what they ask for, those that are there at a time side by side.

    Args:
        engine: whose model is the policy. speech: how messages become its tokens.
        model: its name, which requests have to ask for.
        usual: what holds where a request says nothing; all may have as many new tokens as the context has room for.
    """

    def __init__(
        self, engine: Engine, speech: Speech, model: str, usual: SamplingParams, inbox: SimpleQueue[Ticket]
    ) -> None:
        self._engine, self._speech, self._model, self._usual = engine, speech, model, usual
        self._inbox = inbox

    def run(self, over: Callable[[], bool] = lambda: False) -> None:
        """Until `over()`, or what it or the sampling raises; whoever waits then is told."""
        while not over():
            if (ticket := self._wait()) is not None:
                self._serve(ticket, over)

    def _wait(self) -> Ticket | None:
        try:
            return self._inbox.get(timeout=TICK)
        except Empty:
            return None

    def _serve(self, first: Ticket, over: Callable[[], bool]) -> None:
        """That ticket, and all that come before it is answered."""
        desk, waiting, begun = Desk(self._speech), [first], 0
        try:
            with self._engine.open(self._usual, on_tokens=desk.heard) as session:
                while (waiting or session.busy) and not over():
                    for ticket in waiting:
                        begun += self._begin(ticket, session, desk)
                    for sequence in desk.gone():
                        session.cut(sequence)
                    for turn in session.step():
                        answered = desk.answered(turn, session)
                        for sequence in [] if answered is None else answered.sequences:
                            session.close(sequence)
                    waiting = self._waiting() if begun < MOST_SEQUENCES else []
        finally:
            desk.refuse_all(RequestError("the server is closing", status=503))

    def _waiting(self) -> list[Ticket]:
        found = []
        while not self._inbox.empty():
            found.append(self._inbox.get())
        return found

    def _begin(self, ticket: Ticket, session: Session, desk: Desk) -> int:
        """How many sequences it was given; none where it is refused."""
        request = ticket.request
        try:
            if request.model != self._model:
                known = f"there is no model {request.model!r} here, only {self._model!r}"
                raise RequestError(known, "model", "model_not_found", 404)
            tokens = read_conversation(self._speech, request, session.max_length)
            sampling = sampling_of(request, self._usual)
            sequences = session.add(tokens, request.n, streams=_streams(request), sampling=sampling)
        except RequestError as error:
            ticket.tell(error)
            return 0
        except ValueError as error:  # more than `kv_memory` holds, or what `SamplingParams` refuses
            ticket.tell(RequestError(str(error)))
            return 0
        desk.begin(ticket, sequences, tokens)
        return len(sequences)


def read_conversation(speech: Speech, request: ChatRequest, max_length: int) -> list[int]:
    """The ids that the policy reads. Raises RequestError where the chat template refuses the messages, or no token has room after them."""
    try:
        tokens = speech.conversation(request.messages, request.tools)
    except ValueError as error:
        raise RequestError(str(error), "messages") from error
    require_room(tokens, max_length)
    return tokens


def require_room(tokens: list[int], max_length: int) -> None:
    """Raises RequestError unless a new token has room after these."""
    if not 1 <= len(tokens) < max_length:
        fault = f"the messages have {len(tokens)} tokens, expected 1 to {max_length - 1}: one new token needs a place"
        raise RequestError(fault, "messages", "context_length_exceeded")


def sampling_of(request: ChatRequest, usual: SamplingParams) -> SamplingParams:
    """What the request says, `usual` where it says nothing. Raises ValueError as `SamplingParams` does."""
    asked = {"temperature": request.temperature, "top_p": request.top_p, "max_new_tokens": request.max_tokens}
    given = {name: value for name, value in asked.items() if value is not None}
    return replace(usual, **given, stop_strings=(*usual.stop_strings, *request.stop))


def _streams(request: ChatRequest) -> list[int]:
    """Where the draws of each choice come from: a function of the request's seed, or chance."""
    if request.seed is None:
        return [secrets.randbits(63) for _ in range(request.n)]
    digests = [hashlib.blake2b(f"{request.seed}:{i}".encode(), digest_size=8).digest() for i in range(request.n)]
    return [int.from_bytes(digest, "little") >> 1 for digest in digests]
