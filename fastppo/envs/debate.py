"""Debates: several seats, each a sequence of its own, which read what the others said."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from fastppo.debate_config import Debate
from fastppo.envs.dialogue import Dialogue
from fastppo.envs.environment import Observation
from fastppo.envs.episodes import Episode, PlayedTurn, Row, add_begun, described, pack
from fastppo.model.adapters import Adapters
from fastppo.rollout import Engine, FinishReason, Rollout, SamplingParams, Session, Turn
from fastppo.rollout.generation import ValueHead


@dataclass
class SeatEpisode(Episode):
    """What one seat read and said. `prompt` numbers prompts and seats: those of one number have the same of both."""

    seat: str = ""


@dataclass
class Held:
    """One debate."""

    seats: dict[str, SeatEpisode]
    said: dict[int, str] = field(default_factory=dict)
    """By the numbers of the speeches that were held."""
    begun: set[int] = field(default_factory=set)
    """Numbers of speeches."""
    error: str | None = None
    """Why it is invalid."""

    @property
    def number(self) -> int:
        """The higher, the later it stands among those of one call."""
        return min(episode.number for episode in self.seats.values())

    def transcript(self, debate: Debate) -> list[dict[str, str]]:
        """Of each speech who held it and what was said; "" where the debate broke off before."""
        return [{"seat": speech.seat, "text": self.said.get(i, "")} for i, speech in enumerate(debate.speeches)]


class HeldDebates(NamedTuple):
    """`sampling.n` debates of the first row, then of the second, ..."""

    rollout: Rollout
    """A sequence for each seat of each debate, the seats of a debate side by side. All of an invalid debate have `FinishReason.ERROR`."""
    debates: list[Held]


def hold_debates(
    debate: Debate,
    engine: Engine,
    rows: Sequence[Row],
    sampling: SamplingParams,
    dialogue: Dialogue,
    *,
    max_tokens: int | None = None,
    adapters: Adapters | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    check: Callable[[], None] = lambda: None,
    value_head: ValueHead | None = None,
    numbers: Sequence[int] | None = None,
) -> HeldDebates:
    """Hold `sampling.n` debates of each row, side by side.

    What is said depends only on the weights, the row, the seed and the debate's number (up to the rounding of a batch; of a Llama-like fp32 model
    on a CPU, to the last bit).

    Args:
        rows: with `prompt_ids`. sampling: `max_new_tokens` and what ends a completion hold for each speech.
        dialogue: how texts become tokens.
        max_tokens: most of a seat, what it read included; by default the model's context.
        adapters: of the model, with one for each seat, where these differ.
        progress: called with (ended debates, all). check: called often; what it raises ends the debates.
        value_head: as `Engine.generate` takes it.
        numbers: which of the rows are debated here, the others being debated elsewhere; by default all.
    """
    numbers = range(len(rows)) if numbers is None else numbers
    with ExitStack() as stack:
        sessions: dict[str, Session] = {}
        for role in dict.fromkeys(_roles(debate, adapters).values()):
            with _speaking(adapters, role):
                opened = engine.open(sampling, max_length=max_tokens, value_head=value_head)
                sessions[role] = stack.enter_context(opened)
        play = _Debates(debate, sessions, rows, numbers, sampling, dialogue, adapters)
        play.run(progress, check)
        return HeldDebates(play.rollout(engine.model.device), play.debates)


def _roles(debate: Debate, adapters: Adapters | None) -> dict[str, str]:
    """seat -> the role in which it speaks"""
    return dict.fromkeys(debate.seats, "policy") if adapters is None else adapters.seats


def _speaking(adapters: Adapters | None, role: str) -> AbstractContextManager:
    return nullcontext() if adapters is None else adapters.speaking(role)


class _Debates:
    """One call of `hold_debates`."""

    def __init__(
        self,
        debate: Debate,
        sessions: Mapping[str, Session],
        rows: Sequence[Row],
        numbers: Sequence[int],
        sampling: SamplingParams,
        dialogue: Dialogue,
        adapters: Adapters | None,
    ) -> None:
        """sessions: of each role in which seats speak."""
        self._debate, self._sessions, self._dialogue = debate, sessions, dialogue
        self._adapters, self._roles = adapters, _roles(debate, adapters)
        self._temperature = float(sampling.temperature)
        count = len(debate.seats)
        self.debates = [
            Held(
                {
                    seat: SeatEpisode(
                        (prompt * sampling.n + sample) * count + place,
                        prompt * count + place,
                        rows[prompt],
                        sampling.seed,
                        seat=seat,
                    )
                    for place, seat in enumerate(debate.seats)
                }
            )
            for prompt, sample in itertools.product(numbers, range(sampling.n))
        ]
        self._begun: dict[str, list[tuple[SeatEpisode, list[int]]]] = {role: [] for role in sessions}
        self._speeches: dict[int, tuple[Held, int]] = {}  # by the numbers of the episodes whose turn is under way
        self._by_sequence: dict[tuple[str, int], SeatEpisode] = {}  # by role and number in its session
        self._over = 0

    def run(self, progress: Callable[[int, int], None], check: Callable[[], None]) -> None:
        """Hold all to their ends."""
        for held in self.debates:
            self._begin_ready(held)
        told = 0
        while self._speeches:
            for role, session in self._sessions.items():
                self._add_begun(role)
                with _speaking(self._adapters, role):
                    turns = session.step()
                for turn in turns:
                    self._heard(self._by_sequence[role, turn.id], turn)
                check()
            if self._over > told:
                told = self._over
                progress(told, len(self.debates))
        for held in self.debates:
            if held.error is not None:
                for episode in held.seats.values():
                    episode.error, episode.finish_reason = held.error, FinishReason.ERROR

    def rollout(self, device: torch.device) -> Rollout:
        episodes = [episode for held in self.debates for episode in held.seats.values()]
        roles = [self._roles[episode.seat] for episode in episodes]
        played = [
            (session, [episode for episode, own in zip(episodes, roles, strict=True) if own == role])
            for role, session in self._sessions.items()
        ]
        rollout = pack(played, self._temperature, device)
        return rollout if self._adapters is None else replace(rollout, speakers=roles)

    def _begin_ready(self, held: Held) -> None:
        """The speeches that wait for nobody any more."""
        for number, sources in enumerate(self._debate.sources):
            ready = number not in held.begun and held.said.keys() >= set(sources.values())
            if ready and held.error is None:
                held.begun.add(number)
                try:
                    self._begin(held, number)
                except Exception as error:  # a chat template is a program that raises what it likes
                    self._fail(held, described(error))

    def _begin(self, held: Held, number: int) -> None:
        episode = held.seats[self._debate.speeches[number].seat]
        role, text = self._roles[episode.seat], self._reading(held, episode, number)
        session, first = self._sessions[role], not episode.turns
        if first:
            given = self._dialogue.prompt(episode.row, _first_observation(episode.row, text))
        else:
            given = self._dialogue.reply(episode.row, episode.tokens[-1], text)
        length, most = len(episode.tokens) + len(given), session.max_length - 1
        if length > most:
            raise ValueError(
                f"speech {number}, of {episode.seat}, has {length} tokens before it, expected at most {most} (environment.max_tokens)"
            )
        if first:
            self._begun[role].append((episode, given))
        else:
            session.append(episode.sequence, given)
            episode.tokens += given
        self._speeches[episode.number] = held, number

    def _reading(self, held: Held, episode: SeatEpisode, number: int) -> str | None:
        """What the seat reads before a speech; None for the prompt as it is."""
        speech, sources = self._debate.speeches[number], self._debate.sources[number]
        if speech.reads is None:
            return None
        texts = {name: held.said[sources[name]] for name in speech.names if name in sources}
        columns = {name: _column(episode.row, name) for name in speech.names if name not in sources}
        return speech.reads.format_map(texts | columns)

    def _add_begun(self, role: str) -> None:
        begun, self._begun[role] = self._begun[role], []
        for episode, why in add_begun(self._sessions[role], begun):
            held, _ = self._speeches.pop(episode.number)
            self._fail(held, why)
        added = [episode for episode, _ in begun if episode.sequence is not None]
        self._by_sequence |= {(role, episode.sequence): episode for episode in added}

    def _heard(self, episode: SeatEpisode, turn: Turn) -> None:
        """A speech has ended."""
        held, number = self._speeches.pop(episode.number)
        text = self._dialogue.said(turn.tokens)
        episode.tokens += turn.tokens
        episode.turns.append(PlayedTurn(text, len(turn.tokens), None, 0.0))
        episode.finish_reason = turn.finish_reason
        if turn.finish_reason == FinishReason.ERROR:
            self._fail(held, "the model's logits were NaN or infinite")
        if held.error is not None:
            return
        held.said[number] = text
        if not any(speech.seat == episode.seat for speech in self._debate.speeches[number + 1 :]):
            self._sessions[self._roles[episode.seat]].close(turn.id)
        self._over += len(held.said) == len(self._debate.speeches)
        self._begin_ready(held)

    def _fail(self, held: Held, why: str) -> None:
        """The debate is invalid, and the others go on."""
        self._over += held.error is None
        held.error = held.error or why


def _first_observation(row: Row, text: str | None) -> Observation:
    """What a seat reads first, in the place of what the prompt says last."""
    if text is None or isinstance(row["prompt"], str):
        return text
    *before, last = row["prompt"]
    return [*before, {**last, "content": text}]


def _column(row: Row, name: str) -> str:
    """A column's text; of a prompt that is a conversation, what it says last."""
    value: Any = row[name]
    return str(value[-1]["content"] if name == "prompt" and not isinstance(value, str) else value)
