"""Signals that ask a run to end: what is in hand is finished or dropped, the run is saved, and the process ends as it was asked to.

A signal never cuts into an update or into the writing of records. Sampling stops at its next token, a reward that is waited for is given up at
once, an update is finished.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

# Signal -> the handler that it has in a plain Python process. Where it has another one, somebody else handles or ignores it (nohup, say).
ENDING = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}


class Interrupted(KeyboardInterrupt):
    """What is in hand is dropped because of a signal, `number`, which came here or to another rank."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Interruption:
    """Holds the ending signals off while it is open; `number` is the one that came. A second one ends the process at once.

    Only a main thread may handle signals: elsewhere nothing is held off.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._at_once = False
        self._held: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number, usual in ENDING.items():
                if signal.getsignal(number) is usual:
                    self._held[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        self._let_go()
        self.number = None

    def _let_go(self) -> None:
        while self._held:
            signal.signal(*self._held.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._let_go()
        if self._at_once:
            raise Interrupted(number)

    def check(self, *ignored: object) -> None:
        """Raise Interrupted when a signal has come; serves as a callback, whatever that is given."""
        if self.number is not None:
            raise Interrupted(self.number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, a signal raises Interrupted wherever it comes."""
        self._at_once = True
        try:
            self.check()
            yield
        finally:
            self._at_once = False


def end(interrupted: Interrupted) -> NoReturn:
    """End as the signal asked to: KeyboardInterrupt for SIGINT, else an exit with the code that shells give for it (143 for SIGTERM)."""
    if interrupted.number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + interrupted.number)
