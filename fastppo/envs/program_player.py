"""Episodes of programs: what they ask the policy for, put together to the sequences that it was."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Any

from fastppo.environment_config import EnvironmentConfig
from fastppo.envs.dialogue import Dialogue
from fastppo.envs.environment import Message, to_reward
from fastppo.envs.episodes import (
    CLOSE_SECONDS,
    GATHER,
    GRACE,
    TICK,
    Episode,
    Played,
    PlayedTurn,
    Row,
    check_max_tokens,
    described,
    pack,
    seed_of,
)
from fastppo.envs.program import AgentProgram, Ended, ProgramRun, Task
from fastppo.envs.rounds import Rounds
from fastppo.rollout import Engine, FinishReason, SamplingParams, Session, Turn
from fastppo.rollout.generation import ValueHead
from fastppo.serve import Answered, ChatRequest, ChatServer, Desk, RequestError, Ticket
from fastppo.serve.request import assistant_message
from fastppo.serve.service import read_conversation, require_room

MODEL = "policy"


@dataclass(eq=False)
class _Exchange:
    """A request that was answered, and where the answer stands."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    answer: Message
    sequence: int
    tokens: list[int]
    """All ids up to the end of the answer."""
    continued: bool = False
    """More stands behind it in its sequence."""

    def precedes(self, request: ChatRequest) -> bool:
        """Whether the request goes on from here."""
        known = [*self.messages, self.answer]
        return request.messages[: len(known)] == known and request.tools == self.tools


@dataclass(eq=False)
class _Talk:
    """A program's episode."""

    number: int
    prompt: int
    row: Row
    seed: int
    key: str
    run: ProgramRun | None = None
    deadline: float = 0.0
    asked: int = 0
    exchanges: list[_Exchange] = field(default_factory=list)
    parts: dict[int, Episode] = field(default_factory=dict)
    """What was said, by sequence."""
    limit: str | None = None
    """The limit for which one of its requests was refused."""
    over: bool = False
    error: str | None = None

    def part(self, sequence: int | None) -> Episode:
        return Episode(self.number, self.prompt, self.row, self.seed, sequence=sequence)


class ProgramPlayer:
    """Plays episodes of a program on an engine, whose policy it serves on loopback, as `EpisodePlayer` does for environments.

    An episode is one sequence as long as each request goes on from an earlier one's answer and the chat template leaves what was said as it was; what
    was generated stays the ids that it was. Any other request begins a further sequence of the same episode, with the same reward.

    Raises ValueError as `check_max_tokens`, ImportError where the server's packages are missing.
    """

    def __init__(self, program: AgentProgram, engine: Engine, config: EnvironmentConfig) -> None:
        check_max_tokens(engine.model, config.max_tokens)
        self.program, self._engine, self.config = program, engine, config
        self.inbox: SimpleQueue[Ticket | Ended] = SimpleQueue()
        self.talks: dict[str, _Talk] = {}
        """Those that may ask, by their API keys."""
        self._server = ChatServer(MODEL, self.inbox, self.talks.get)
        self._base_url: str | None = None
        self._hanging: list[ProgramRun] = []

    @property
    def base_url(self) -> str:
        if self._base_url is None:
            self._base_url = self._server.open()
        return self._base_url

    def play(
        self,
        rows: Sequence[Row],
        sampling: SamplingParams,
        dialogue: Dialogue,
        *,
        progress: Callable[[int, int], None] = lambda done, total: None,
        check: Callable[[], None] = lambda: None,
        value_head: ValueHead | None = None,
        numbers: Sequence[int] | None = None,
    ) -> Played:
        """`sampling.n` episodes of each row. Temperature and filters are `sampling`'s, whatever a request says; its `max_tokens` and `stop` hold.

        Args: as `EpisodePlayer.play` takes them.

        Returns: an `Episode` for each sequence; those of one program have one `number`, and each is paid what the program was.
        """
        desk = Desk(dialogue)
        options = dict(max_length=self.config.max_tokens, on_tokens=desk.heard, value_head=value_head)
        with self._engine.open(sampling, **options) as session:
            numbers = range(len(rows)) if numbers is None else numbers
            play = _ProgramPlay(self, session, desk, rows, numbers, sampling, dialogue)
            try:
                waited = play.run(progress, check)
                episodes = play.episodes()
                rollout = pack([(session, episodes)], float(sampling.temperature), self._engine.model.device)
            finally:
                play.drop()
        self._hanging = [run for run in self._hanging if not run.join(0.0)]
        return Played(rollout, episodes, waited, len(self._hanging))

    def close(self) -> None:
        """Stop to serve, and end all programs but for functions that hang."""
        self._server.close()
        self._base_url = None
        deadline = time.monotonic() + CLOSE_SECONDS
        self._hanging = [run for run in self._hanging if not run.join(max(0.0, deadline - time.monotonic()))]

    def abandon(self, run: ProgramRun) -> None:
        run.drop()
        self._hanging.append(run)


class _ProgramPlay(Rounds):
    """One call of `ProgramPlayer.play`."""

    def __init__(
        self,
        player: ProgramPlayer,
        session: Session,
        desk: Desk,
        rows: Sequence[Row],
        numbers: Sequence[int],
        sampling: SamplingParams,
        dialogue: Dialogue,
    ) -> None:
        super().__init__(session, len(numbers) * sampling.n)
        self._player, self._desk = player, desk
        self._sampling, self._dialogue = sampling, dialogue
        self._step_of_streams = len(rows) * sampling.n  # to the next sequence of an episode
        self._talks = [
            _Talk(number, prompt, rows[prompt], seed_of(sampling.seed, prompt), secrets.token_urlsafe(24))
            for prompt in numbers
            for number in range(prompt * sampling.n, (prompt + 1) * sampling.n)
        ]
        self._to_begin = self._talks[::-1]
        self._running: dict[ProgramRun, _Talk] = {}
        self._by_sequence: dict[int, _Talk] = {}

    def episodes(self) -> list[Episode]:
        """One for each sequence, in the order of the programs' numbers."""
        found = []
        for talk in self._talks:
            parts = [talk.parts[sequence] for sequence in sorted(talk.parts)] or [talk.part(None)]
            reason = FinishReason.LENGTH if talk.limit else FinishReason.STOP
            for part in parts:
                part.error = talk.error
                part.finish_reason = reason if talk.error is None else FinishReason.ERROR
            found += parts
        return found

    def drop(self) -> None:
        """Leave nothing running."""
        self._desk.refuse_all(RequestError("the episode is over", status=503))
        for talk in self._talks:
            self._player.talks.pop(talk.key, None)
        for run in self._running:
            self._player.abandon(run)

    # Programs

    def _begin_more(self) -> None:
        config = self._player.config
        while self._to_begin and len(self._running) < config.concurrent:
            talk = self._to_begin.pop()
            self._player.talks[talk.key] = talk
            task = Task(talk.row, talk.seed, self._player.base_url, talk.key, config.episode_timeout)
            talk.deadline = time.monotonic() + config.episode_timeout + GRACE
            talk.run = ProgramRun(self._player.program, task, self._player.inbox)
            self._running[talk.run] = talk

    def _hear(self, *, wait: bool) -> None:
        """Take what programs ask and what they end with; where `wait`, until one does, and as long as more come at once."""
        patience = TICK if wait else 0.0
        with suppress(Empty):
            while self._running:
                inbox = self._player.inbox
                said = inbox.get(timeout=patience) if patience else inbox.get_nowait()
                patience = GATHER if wait else 0.0
                if isinstance(said, Ended):
                    self._take_end(said)
                else:
                    self._take_request(said)
        now = time.monotonic()
        for talk in [talk for talk in self._running.values() if talk.deadline <= now]:
            self._fail(talk, self._too_long)

    @property
    def _too_long(self) -> str:
        return f"the program took longer than {self._player.config.episode_timeout:g} s (environment.episode_timeout)"

    def _take_end(self, ended: Ended) -> None:
        talk = self._running.pop(ended.run, None)
        if talk is None:  # it was given up
            return
        error = ended.error
        if error is not None:
            late = isinstance(error, asyncio.TimeoutError | TimeoutError) and not error.args
            limit = f" (a request was refused: {talk.limit})" if talk.limit else ""
            self._fail(talk, self._too_long if late else f"the program failed: {described(error)}{limit}")
        elif not talk.exchanges:
            self._fail(talk, "the program ended without an answer of the policy")
        elif any(part.finish_reason is None for part in talk.parts.values()):
            self._fail(talk, "the program ended before one of its requests was answered")
        else:
            self._pay(talk, ended.reward)

    def _pay(self, talk: _Talk, reward: Any) -> None:
        try:
            paid = to_reward(reward, "the reward of the program")
        except (TypeError, ValueError) as error:
            self._fail(talk, described(error))
            return
        for part in talk.parts.values():
            part.turns[-1] = part.turns[-1]._replace(reward=paid)
        self._leave(talk)

    def _fail(self, talk: _Talk, why: str) -> None:
        """The episode is invalid, and the others go on."""
        if not talk.over:
            talk.error = why
            self._leave(talk)

    def _leave(self, talk: _Talk) -> None:
        """It can ask no more, and its turns under way end with their next tokens."""
        talk.over = True
        self._player.talks.pop(talk.key, None)
        if self._running.pop(talk.run, None) is not None:
            self._player.abandon(talk.run)
        self._ended += 1
        for sequence, part in talk.parts.items():
            if part.finish_reason is None:
                self._session.cut(sequence)
            else:
                self._session.close(sequence)

    # Requests

    def _take_request(self, ticket: Ticket) -> None:
        talk = ticket.owner
        try:
            if talk.over or self._player.talks.get(talk.key) is not talk:
                raise RequestError("the episode is over", code="invalid_api_key", status=401)
            self._begin(ticket, talk)
        except RequestError as error:
            if error.code in ("max_turns", "context_length_exceeded"):
                talk.limit = str(error)
            ticket.tell(error)
        except ValueError as error:  # more than `kv_memory` holds, or what the chat template refuses
            ticket.tell(RequestError(str(error)))

    def _begin(self, ticket: Ticket, talk: _Talk) -> None:
        request, most_turns = ticket.request, self._player.config.max_turns
        if talk.asked == most_turns:
            fault = f"the episode has had its {most_turns} turns, the most there may be (environment.max_turns)"
            raise RequestError(fault, code="max_turns")
        sampling = self._sampling_of(request)
        before = max(
            (exchange for exchange in talk.exchanges if exchange.precedes(request)),
            key=lambda exchange: len(exchange.messages),
            default=None,
        )
        given = None
        if before is not None:
            answered, last = len(before.messages), before.tokens[-1]
            given = self._dialogue.continuation(request.messages, answered, last, request.tools)
        if given is None:
            past = read_conversation(self._dialogue, request, self._session.max_length)
        else:
            past = before.tokens + given
            require_room(past, self._session.max_length)
        if given is not None and not before.continued and request.n == 1:
            self._session.append(before.sequence, given, sampling=sampling)
            sequences, before.continued, part = [before.sequence], True, talk.parts[before.sequence]
            observation = request.messages[len(before.messages) + 1 :]
            part.turns[-1], part.finish_reason = part.turns[-1]._replace(observation=observation), None
        else:
            begun = len(talk.parts)
            streams = [talk.number + (begun + i) * self._step_of_streams for i in range(request.n)]
            sequences = self._session.add(past, request.n, streams=streams, sampling=sampling)
            talk.parts |= {sequence: talk.part(sequence) for sequence in sequences}
            self._by_sequence |= dict.fromkeys(sequences, talk)
        talk.asked += 1
        self._desk.begin(ticket, sequences, past)

    def _sampling_of(self, request: ChatRequest) -> SamplingParams:
        most = self._sampling.max_new_tokens
        return replace(
            self._sampling,
            max_new_tokens=most if request.max_tokens is None else min(request.max_tokens, most),
            stop_strings=(*self._sampling.stop_strings, *request.stop),
        )

    def _answer(self, turn: Turn) -> None:
        """A turn has ended: the program is told, and what was said is remembered."""
        talk, answered = self._by_sequence[turn.id], self._desk.answered(turn, self._session)
        talk.parts[turn.id].finish_reason = turn.finish_reason
        if talk.over:
            self._session.close(turn.id)
        elif turn.finish_reason == FinishReason.ERROR:
            self._fail(talk, "the model's logits were NaN or infinite")
        elif answered is not None:
            self._remember(talk, answered)

    def _remember(self, talk: _Talk, answered: Answered) -> None:
        request = answered.ticket.request
        for sequence, reply in zip(answered.sequences, answered.replies, strict=True):
            talk.parts[sequence].turns.append(PlayedTurn(reply.content, len(reply.tokens), None, 0.0))
            answer, tokens = assistant_message(reply.content, reply.tool_calls), answered.past + reply.tokens
            talk.exchanges.append(_Exchange(request.messages, request.tools, answer, sequence, tokens))

    def _before_step(self) -> None:
        """An answer that nobody reads cannot be paid."""
        for sequence in self._desk.gone():
            self._session.cut(sequence)
            self._fail(self._by_sequence[sequence], "the program closed a request before it was answered")
