"""An environment with the one thread that makes it, calls it and closes it."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, NamedTuple

from fastppo.envs.tools import as_environment

CLOSE_SECONDS = 5.0  # that an asynchronous `close` may take


class Reply(NamedTuple):
    """What came of a call: a value, or the exception that it ended with."""

    worker: Worker
    value: Any
    error: BaseException | None


class Worker:
    """Calls an environment in a thread, and puts each `Reply` where all workers put theirs.

    A thread cannot be killed: a call that hangs is abandoned. Then `close()` of the environment is called from another thread, and what the
    call still returns goes nowhere; its thread ends with it. A coroutine is cancelled at its time limit.
    """

    def __init__(self, factory: Callable[[], Any], replies: SimpleQueue[Reply]) -> None:
        """factory: makes the environment, in the thread, at the first call."""
        self._factory, self._replies = factory, replies
        self._calls: SimpleQueue[tuple[Callable[[Any], Any], float] | None] = SimpleQueue()
        self._environment: Any = None
        self._closing = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="fastppo environment", daemon=True)
        self._thread.start()

    @property
    def environment(self) -> Any:
        """What it has made."""
        return self._environment

    def ask(self, function: Callable[[Any], Any], timeout: float) -> None:
        """Call `function(environment)`; a coroutine that it returns is awaited for at most `timeout` seconds."""
        self._calls.put((function, timeout))

    def stop(self) -> None:
        """Close the environment and end, after the call in hand."""
        self._calls.put(None)

    def abandon(self) -> None:
        """End a worker whose call hangs."""
        self.stop()
        threading.Thread(target=self._close, name="fastppo environment closing", daemon=True).start()

    def join(self, seconds: float) -> bool:
        """Whether its thread has ended, or does so in this time."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        with _Loop() as loop:
            while (job := self._calls.get()) is not None:
                function, timeout = job
                try:
                    if self._environment is None:
                        self._environment = as_environment(loop.result(self._factory(), timeout))
                    value, error = loop.result(function(self._environment), timeout), None
                except BaseException as raised:  # also SystemExit: it ends an episode, not the run
                    value, error = None, raised
                self._replies.put(Reply(self, value, error))
            self._close(loop)

    def _close(self, loop: _Loop | None = None) -> None:
        """Once, whoever comes first. What goes wrong is nobody's loss: the environment is not used again."""
        with self._closing:
            environment, self._environment = self._environment, None
        close = getattr(environment, "close", None)
        if callable(close):
            with contextlib.suppress(Exception), contextlib.nullcontext(loop) if loop else _Loop() as own:
                own.result(close(), CLOSE_SECONDS)


class _Loop:
    """An event loop that is made when the first coroutine comes."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def __enter__(self) -> _Loop:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._loop is not None:
            self._loop.close()

    def result(self, value: Any, timeout: float) -> Any:
        """The value, or what it comes to where it has to be awaited."""
        if not inspect.isawaitable(value):
            return value
        self._loop = self._loop or asyncio.new_event_loop()
        return self._loop.run_until_complete(asyncio.wait_for(value, timeout))
