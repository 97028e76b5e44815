"""The one event loop of a process: what an async reward made once (a session, a lock, a semaphore) works at the next step too."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

SHOWN_TASKS = 8
CANCEL_SECONDS = 1.0

# By process id: a fork has a loop and a lock of its own, and must not close its copy of another's loop, whose descriptors are shared.
_loops: dict[int, tuple[asyncio.AbstractEventLoop, threading.Lock]] = {}


def wait_for(awaitable: Awaitable[Any]) -> Any:
    """Its result. Between calls the loop stands still; tasks that were left in it go on at the next call."""
    loop, turn = _loop_and_lock()
    try:
        busy = asyncio.get_running_loop()
    except RuntimeError:
        return _run(awaitable, loop, turn)
    if busy is loop:
        raise RuntimeError("an async reward called another reward and waits for it inside its own event loop")
    with ThreadPoolExecutor(1) as pool:  # this thread's loop is busy with the caller: a notebook's
        return pool.submit(_run, awaitable, loop, turn).result()


def waiting_tasks() -> str:
    """Where each task of this process's loop waits, innermost call first, in the form of a traceback."""
    loops = [loop for pid, (loop, _) in _loops.items() if pid == os.getpid()]
    tasks = [task for loop in loops for task in asyncio.all_tasks(loop)][:SHOWN_TASKS]
    return "".join(f"Task {task.get_name()} (most recent call first):\n{_places(task.get_coro())}" for task in tasks)


def _loop_and_lock() -> tuple[asyncio.AbstractEventLoop, threading.Lock]:
    pid = os.getpid()
    if pid not in _loops:
        _loops[pid] = asyncio.new_event_loop(), threading.Lock()
        atexit.register(_close, _loops[pid][0])
    return _loops[pid]


def _close(loop: asyncio.AbstractEventLoop) -> None:
    """At the interpreter's end, as asyncio.run does it; but a task that ignores its cancellation is not waited for."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks and not loop.is_running():
        loop.run_until_complete(asyncio.wait(tasks, timeout=CANCEL_SECONDS))
    loop.close()


def _run(awaitable: Awaitable[Any], loop: asyncio.AbstractEventLoop, turn: threading.Lock) -> Any:
    async def wait() -> Any:
        return await awaitable

    with turn:
        task = loop.create_task(wait())
        try:
            return loop.run_until_complete(task)
        finally:
            task.cancel()  # after Ctrl-C, which leaves it unfinished


def _places(coroutine: Any) -> str:
    lines = [f'  File "{f.f_code.co_filename}", line {f.f_lineno} in {f.f_code.co_name}\n' for f in _frames(coroutine)]
    return "".join(reversed(lines))


def _frames(coroutine: Any) -> Iterator[FrameType]:
    """From the outermost coroutine to the one that waits for something else."""
    while (frame := getattr(coroutine, "cr_frame", None)) is not None:
        if frame.f_code.co_filename != __file__:
            yield frame
        coroutine = coroutine.cr_await
