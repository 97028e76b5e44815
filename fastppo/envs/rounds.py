"""What every play of episodes does, round by round: begin some, hear from those outside, sample a step, pass on what was said."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable

from fastppo.rollout import Session, Turn


class Rounds(ABC):
    """A play of `total` episodes on one session."""

    def __init__(self, session: Session, total: int) -> None:
        self._session, self._total, self._ended = session, total, 0

    def run(self, progress: Callable[[int, int], None], check: Callable[[], None]) -> float:
        """Play all to their ends. Returns the seconds in which nothing could be sampled.

        progress: called with (ended episodes, all). check: called often; what it raises ends the play.
        """
        waited, told = 0.0, 0
        while self._ended < self._total or self._session.busy:
            self._begin_more()
            start, waits = time.perf_counter(), not self._session.busy
            self._hear(wait=waits)
            waited += time.perf_counter() - start if waits else 0.0
            self._before_step()
            for turn in self._session.step():
                self._answer(turn)
            if self._ended > told:
                told = self._ended
                progress(told, self._total)
            check()
        return waited

    @abstractmethod
    def _begin_more(self) -> None:
        """Let episodes begin that have room."""

    @abstractmethod
    def _hear(self, *, wait: bool) -> None:
        """Take what has come from outside; where `wait`, until something has, and as long as more comes at once."""

    @abstractmethod
    def _before_step(self) -> None:
        """What is to be done before the next step of sampling."""

    @abstractmethod
    def _answer(self, turn: Turn) -> None:
        """A turn has ended."""
