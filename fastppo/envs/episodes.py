"""Episodes: many environments on one session of the sampler, none of which waits for another."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastppo.environment_config import EnvironmentConfig
from fastppo.envs.dialogue import Dialogue, as_messages
from fastppo.envs.environment import Message, Observation, reset, to_first_observation, to_reward, to_step
from fastppo.envs.rounds import Rounds
from fastppo.envs.worker import Reply, Worker
from fastppo.model import context_length
from fastppo.model.host import on_device
from fastppo.rollout import Engine, FinishReason, Rollout, SamplingParams, Session, Turn
from fastppo.rollout.generation import ValueHead
from fastppo.rollout.record import bounds_of

TICK = 0.1  # seconds at most between looks at whether the run is to end
GATHER = 0.002  # seconds that a further answer may come after one, to be run in one forward with it
GRACE = 0.5  # seconds that a coroutine may take to be cancelled at its time limit
CLOSE_SECONDS = 5.0  # that environments may take to close at the end

Factory = Callable[[], Any]
Row = Mapping[str, Any]


class PlayedTurn(NamedTuple):
    """What the policy said, and what the environment made of it."""

    completion: str
    tokens: int
    observation: Observation
    reward: float


@dataclass
class Episode:
    """One conversation of the policy with an environment."""

    number: int
    """Among those of a `play`; the policy's draws come from it."""
    prompt: int
    """Which of the rows it is of."""
    row: Row
    seed: int
    turns: list[PlayedTurn] = field(default_factory=list)
    error: str | None = None
    """Why it is invalid."""
    finish_reason: FinishReason | None = None
    """STOP where the environment terminated it, LENGTH where it was truncated, ERROR where it is invalid; None while it is played."""
    sequence: int | None = None
    """Of the session; None where `reset` failed."""
    tokens: list[int] = field(default_factory=list)
    """All that was said so far."""
    tools: Sequence[dict[str, Any]] = ()
    """Schemas of the environment's tools."""

    @property
    def total_reward(self) -> float:
        """NaN where it is invalid."""
        return math.nan if self.error is not None else sum(turn.reward for turn in self.turns)

    def messages(self) -> list[Message]:
        """What was said after the prompt, by the policy and by the environment."""
        found: list[Message] = []
        for turn in self.turns:
            found.append({"role": "assistant", "content": turn.completion})
            found += [] if turn.observation is None else as_messages(turn.observation)
        return found

    @property
    def truncated(self) -> bool:
        return self.finish_reason == FinishReason.LENGTH


@dataclass(frozen=True)
class Played:
    """B episodes, all of the first row, all of the second, ..."""

    rollout: Rollout
    """Theirs, in that order. What the environment said is no action. An invalid one ends where it failed."""
    episodes: list[Episode]
    waited: float
    """Seconds in which nothing was sampled because every episode waited for its environment."""
    hanging: int
    """Calls that took too long and have not returned since, each of which keeps a thread."""

    @classmethod
    def joined(cls, parts: Sequence[Played], rollout: Rollout) -> Played:
        """Episodes of the same rows that were played in several places at once. rollout: theirs, in the order of their numbers."""
        episodes = sorted((episode for part in parts for episode in part.episodes), key=lambda episode: episode.number)
        return cls(rollout, episodes, max(part.waited for part in parts), sum(part.hanging for part in parts))

    def turn_rewards(self) -> Tensor:
        """fp32 [N]: at each turn's last action what the environment paid for it, else 0."""
        rewards = [0.0] * self.rollout.num_actions
        for place, episode in zip(self.rollout.action_bounds, self.episodes, strict=False):
            for turn in episode.turns:
                place += turn.tokens
                rewards[place - 1] = turn.reward
        return on_device(rewards, self.rollout.tokens.device, torch.float32)


class EpisodePlayer:
    """Plays episodes on an engine. Environments are kept for the next episodes; after `close` the next `play` makes new ones.

    Args:
        factory: makes an environment; called in the thread in which that one then lives.
        engine: whose model is the policy.
        config: limits.

    Raises TypeError for what makes nothing, ValueError as `check_max_tokens`.
    """

    def __init__(self, factory: Factory, engine: Engine, config: EnvironmentConfig) -> None:
        if not callable(factory):
            raise TypeError(
                f"{type(factory).__name__} is no environment, expected a class or a function that makes one"
            )
        check_max_tokens(engine.model, config.max_tokens)
        self._factory, self._engine, self._config = factory, engine, config
        self._replies: SimpleQueue[Reply] = SimpleQueue()
        self._idle: list[Worker] = []
        self._hanging: list[Worker] = []

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
        """`sampling.n` episodes of each row, whose turns are sampled side by side.

        An episode depends only on the weights, its row, the seed and its number, not on when the others' environments answer (up to the
        rounding of a batch; of a Llama-like fp32 model on a CPU, to the last bit).

        Args:
            rows: with `prompt_ids`. sampling: `max_new_tokens` and what ends a completion hold for each turn.
            dialogue: how texts become tokens.
            progress: called with (ended episodes, all). check: called often; what it raises ends the play.
            value_head: as `Engine.generate` takes it.
            numbers: which of the rows are played here, the others being played elsewhere; by default all.
        """
        options = dict(max_length=self._config.max_tokens, value_head=value_head)
        with self._engine.open(sampling, **options) as session:
            numbers = range(len(rows)) if numbers is None else numbers
            play = _Play(self, session, rows, numbers, sampling, dialogue, self._config)
            try:
                waited = play.run(progress, check)
                rollout = pack([(session, play.episodes)], float(sampling.temperature), self._engine.model.device)
            except BaseException:
                play.drop()
                raise
        self._hanging = [worker for worker in self._hanging if not worker.join(0.0)]
        return Played(rollout, play.episodes, waited, len(self._hanging))

    def close(self) -> None:
        """End all environments and their threads, but for those whose call hangs."""
        idle, self._idle = self._idle, []
        for worker in idle:
            worker.stop()
        deadline = time.monotonic() + CLOSE_SECONDS
        self._hanging += [worker for worker in idle if not worker.join(max(0.0, deadline - time.monotonic()))]

    # For a play

    def worker(self) -> Worker:
        return self._idle.pop() if self._idle else Worker(self._factory, self._replies)

    def put_back(self, worker: Worker) -> None:
        self._idle.append(worker)

    def abandon(self, worker: Worker) -> None:
        worker.abandon()
        self._hanging.append(worker)

    def next_reply(self, seconds: float) -> Reply:
        """Raises `queue.Empty` where none comes in this time."""
        return self._replies.get(timeout=seconds) if seconds > 0 else self._replies.get_nowait()


class _Asked(NamedTuple):
    """A call that is under way."""

    episode: Episode
    what: str
    deadline: float
    then: Callable[[Any], None]


class _Play(Rounds):
    """One call of `EpisodePlayer.play`."""

    def __init__(
        self,
        player: EpisodePlayer,
        session: Session,
        rows: Sequence[Row],
        numbers: Sequence[int],
        sampling: SamplingParams,
        dialogue: Dialogue,
        config: EnvironmentConfig,
    ) -> None:
        super().__init__(session, len(numbers) * sampling.n)
        self._player, self._dialogue = player, dialogue
        self._sampling, self._config = sampling, config
        self.episodes = [
            Episode(prompt * sampling.n + sample, prompt, rows[prompt], seed_of(sampling.seed, prompt))
            for prompt, sample in itertools.product(numbers, range(sampling.n))
        ]
        self._to_begin = self.episodes[::-1]
        self._workers: dict[int, Worker] = {}  # by the numbers of the episodes that are played
        self._asked: dict[Worker, _Asked] = {}
        self._begun: list[tuple[Episode, list[int]]] = []  # that are to be added to the session
        self._by_sequence: dict[int, Episode] = {}
        self._closed: set[int] = set()  # sequences

    def drop(self) -> None:
        """Leave nothing running."""
        for worker in self._workers.values():
            if worker in self._asked:
                self._player.abandon(worker)
            else:
                worker.stop()

    # Calls

    def _begin_more(self) -> None:
        while self._to_begin and len(self._workers) < self._config.concurrent:
            episode = self._to_begin.pop()
            self._workers[episode.number] = self._player.worker()
            call = functools.partial(reset, row=episode.row, seed=episode.seed)
            self._ask(episode, "reset", call, functools.partial(self._reset, episode))

    def _ask(self, episode: Episode, what: str, call: Callable[[Any], Any], then: Callable[[Any], None]) -> None:
        """`call(environment)`, in its thread; `then` hears what it returned."""
        worker = self._workers[episode.number]
        deadline = time.monotonic() + self._config.call_timeout + GRACE
        self._asked[worker] = _Asked(episode, what, deadline, then)
        worker.ask(call, self._config.call_timeout)

    def _hear(self, *, wait: bool) -> None:
        """Take what environments have answered; where `wait`, until one has, and as long as more come at once."""
        patience = self._patience() if wait else 0.0
        with suppress(Empty):
            while self._asked:
                self._take(self._player.next_reply(patience))
                patience = GATHER if wait else 0.0
        now = time.monotonic()
        for worker, asked in [(worker, asked) for worker, asked in self._asked.items() if asked.deadline <= now]:
            del self._asked[worker]
            self._player.abandon(worker)
            self._fail(asked.episode, self._too_long(asked.what))

    def _patience(self) -> float:
        first = min((asked.deadline for asked in self._asked.values()), default=0.0)
        return min(max(first - time.monotonic(), 0.0), TICK)

    def _take(self, reply: Reply) -> None:
        asked = self._asked.get(reply.worker)
        if asked is None:  # it was given up
            return
        del self._asked[reply.worker]
        why = None
        if reply.error is not None:
            late = isinstance(reply.error, asyncio.TimeoutError) and not reply.error.args
            why = self._too_long(asked.what) if late else f"{asked.what} failed: {described(reply.error)}"
        else:
            try:
                asked.then(reply.value)
            except Exception as error:  # an answer that is none, or that the chat template refuses
                why = described(error)
        if why is not None:
            reply.worker.stop()
            self._fail(asked.episode, why)

    def _too_long(self, what: str) -> str:
        return f"{what} took longer than {self._config.call_timeout:g} s (environment.call_timeout)"

    # An episode's life

    def _reset(self, episode: Episode, returned: Any) -> None:
        episode.tools = getattr(self._workers[episode.number].environment, "tools", ())
        tokens = self._dialogue.prompt(episode.row, to_first_observation(returned), episode.tools)
        most = self._session.max_length - 1
        if not 1 <= len(tokens) <= most:
            raise ValueError(f"the first observation has {len(tokens)} tokens, expected 1 to {most}")
        self._begun.append((episode, tokens))

    def _before_step(self) -> None:
        begun, self._begun = self._begun, []
        for episode, why in add_begun(self._session, begun):
            self._fail_without_fault(episode, why)
        self._by_sequence |= {episode.sequence: episode for episode, _ in begun if episode.sequence is not None}

    def _answer(self, turn: Turn) -> None:
        """A turn has ended: tell the environment."""
        episode = self._by_sequence[turn.id]
        past = list(episode.tokens)
        episode.tokens += turn.tokens
        if turn.finish_reason == FinishReason.ERROR:
            self._fail_without_fault(episode, "the model's logits were NaN or infinite")
            return
        said = self._dialogue.said(turn.tokens)
        if episode.tools:
            said = self._dialogue.message(past, turn.tokens, episode.tools)
        self._ask(episode, "step", lambda env: env.step(said), functools.partial(self._stepped, episode, turn))

    def _stepped(self, episode: Episode, turn: Turn, returned: Any) -> None:
        step = to_step(returned)
        played = PlayedTurn(self._dialogue.said(turn.tokens), len(turn.tokens), step.observation, step.reward)
        episode.turns.append(played)
        if step.terminated:
            self._end(episode, FinishReason.STOP, [])
            return
        given = self._dialogue.reply(episode.row, turn.tokens[-1], step.observation)
        fits = len(episode.tokens) + len(given) < self._session.max_length
        if step.truncated or len(episode.turns) == self._config.max_turns or not fits:
            self._end(episode, FinishReason.LENGTH, given if fits else [])
            return
        episode.tokens += given
        self._session.append(episode.sequence, given)

    def _end(self, episode: Episode, reason: FinishReason, last_words: list[int]) -> None:
        """No turn will follow; what the environment has still to pay is asked for."""
        self._close_sequence(episode, last_words)
        self._ask(episode, "get_reward", _final_reward, functools.partial(self._paid, episode, reason))

    def _paid(self, episode: Episode, reason: FinishReason, value: Any) -> None:
        last = episode.turns[-1]
        episode.turns[-1] = last._replace(reward=last.reward + to_reward(value, "get_reward"))
        self._player.put_back(self._workers[episode.number])
        self._leave(episode, reason)

    def _fail(self, episode: Episode, why: str) -> None:
        """The episode is invalid, and the others go on."""
        episode.error = why
        self._close_sequence(episode, [])
        self._leave(episode, FinishReason.ERROR)

    def _fail_without_fault(self, episode: Episode, why: str) -> None:
        """Its environment is fine."""
        self._player.put_back(self._workers[episode.number])
        self._fail(episode, why)

    def _close_sequence(self, episode: Episode, last_words: list[int]) -> None:
        if episode.sequence is not None and episode.sequence not in self._closed:
            self._session.close(episode.sequence, last_words)
            self._closed.add(episode.sequence)

    def _leave(self, episode: Episode, reason: FinishReason) -> None:
        episode.finish_reason = reason
        self._ended += 1
        del self._workers[episode.number]


def check_max_tokens(model: PreTrainedModel, max_tokens: int | None) -> None:
    """Raises ValueError for one that the model's context does not hold, and for None where that has no limit."""
    context = context_length(model)
    if context is not None and (max_tokens or 0) > context:
        raise ValueError(f"max_tokens is {max_tokens}, expected at most the model's context of {context}")
    if context is None and max_tokens is None:
        raise ValueError("max_tokens is None, expected a number: the model's context has no limit")


def add_begun(session: Session, begun: Sequence[tuple[Episode, list[int]]]) -> list[tuple[Episode, str]]:
    """Add episodes with what they begin with to the session: those that begin alike share what is computed of it.

    Returns those that cannot begin, each with the reason: ids that the model does not know, or more than `kv_memory` holds.
    """
    groups: dict[tuple[int, ...], list[Episode]] = {}
    failed: list[tuple[Episode, str]] = []
    for episode, tokens in sorted(begun, key=lambda one: one[0].number):
        groups.setdefault(tuple(tokens), []).append(episode)
    for tokens, episodes in groups.items():
        try:
            ids = session.add(tokens, len(episodes), streams=[episode.number for episode in episodes])
        except ValueError as error:
            failed += [(episode, described(error)) for episode in episodes]
            continue
        for id, episode in zip(ids, episodes, strict=True):
            episode.sequence, episode.tokens = id, list(tokens)
    return failed


def pack(played: Sequence[tuple[Session, Sequence[Episode]]], temperature: float, device: torch.device) -> Rollout:
    """The rollout of all episodes in the order of their numbers, from sessions in which only these were played. Those of one number stay in the
    order in which they stand."""
    parts, order = [], []
    for session, episodes in played:
        if begun := sorted((e for e in episodes if e.sequence is not None), key=lambda e: e.sequence):
            parts.append(session.rollout())
            order += begun
    if others := [e for _, episodes in played for e in episodes if e.sequence is None]:
        parts.append(_prompts_alone(others, temperature, device, bool(parts) and parts[0].values is not None))
        order += others
    whole = parts[0] if len(parts) == 1 else Rollout.joined(parts, [0] * len(parts))
    ranks = {id(e): (e.number, place) for _, episodes in played for place, e in enumerate(episodes)}
    places = sorted(range(len(order)), key=lambda place: ranks[id(order[place])])
    if places != list(range(len(order))):
        whole = whole.select(places)
    in_order = [order[place] for place in places]
    return replace(
        whole,
        finish_reasons=on_device([int(episode.finish_reason) for episode in in_order], device, torch.int8),
        prompt_index=on_device([episode.prompt for episode in in_order], device),
    )


def _final_reward(environment: Any) -> Any:
    """What is paid when all is said, by an environment that has `get_reward`."""
    pay = getattr(environment, "get_reward", None)
    return 0.0 if pay is None else pay()


def _prompts_alone(episodes: list[Episode], temperature: float, device: torch.device, valued: bool) -> Rollout:
    """Sequences without actions, of episodes that could not begin."""
    prompts = [list(episode.row["prompt_ids"]) for episode in episodes]
    tokens = on_device([token for prompt in prompts for token in prompt], device)
    none = torch.zeros(0, dtype=torch.float32, device=device)
    return Rollout(
        tokens=tokens,
        cu_seqlens=on_device(bounds_of(map(len, prompts)), device, torch.int32),
        position_ids=on_device([place for prompt in prompts for place in range(len(prompt))], device),
        action_mask=torch.zeros_like(tokens, dtype=torch.bool),
        logprobs=none,
        processed_logprobs=none,
        finish_reasons=on_device([int(FinishReason.ERROR)] * len(prompts), device, torch.int8),
        prompt_index=on_device([episode.prompt for episode in episodes], device),
        temperature=temperature,
        values=none if valued else None,
    )


def seed_of(seed: int, prompt: int) -> int:
    """Of the environments of one prompt of a play: 0 to 2^31 - 1, which every library takes."""
    digest = hashlib.blake2b(f"{seed}:{prompt}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


def described(error: BaseException) -> str:
    """`ValueError: what it says`, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
