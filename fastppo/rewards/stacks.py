"""Where the function of a process hangs: the process writes its stacks into a pipe at a signal, and its keeper reads them before it kills it."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import select
import signal
from pathlib import Path

from fastppo.rewards import event_loop

STACK_SIGNAL = signal.SIGUSR2
FIRST_WAIT, NEXT_WAIT = 1.0, 0.1  # seconds until the first line must have come, and between two
MAX_BYTES = 1 << 20  # of a hundred threads with a hundred frames each, which is where faulthandler stops
SHOWN_FRAMES, SHOWN_CHARACTERS = 8, 4000

_CALLERS = {str(Path(__file__).with_name(name)) for name in ("function.py", "event_loop.py")}
_FRAME = re.compile(r'  File "(.*)", line \S+ in ')


def write_at_signal(pipe: int) -> None:
    """At the signal, write the stack of every thread, and of the tasks of the event loop if the main thread can still run Python.

    faulthandler's part works whatever the threads are busy with, and however many locks they hold.
    """

    def write_tasks(*_: object) -> None:
        with contextlib.suppress(OSError):
            os.write(pipe, event_loop.waiting_tasks().encode(errors="replace"))

    signal.signal(STACK_SIGNAL, write_tasks)
    faulthandler.register(STACK_SIGNAL, file=pipe, all_threads=True, chain=True)


def ask(pid: int, pipe: int) -> str:
    """The stacks of process `pid`, shortened for a message, each line indented; "" where it writes none."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, STACK_SIGNAL)
    readable = select.poll()
    readable.register(pipe, select.POLLIN)
    written, patience = b"", FIRST_WAIT
    while len(written) < MAX_BYTES and readable.poll(patience * 1000):
        if not (part := os.read(pipe, 1 << 16)):
            break
        written, patience = written + part, NEXT_WAIT
    return shorten(written.decode(errors="replace"))


def shorten(text: str) -> str:
    """Of each stack the innermost calls, down to where the function was called; the stack that called it first."""
    stacks = [_Stack(part) for part in re.split(r"^(?=\S.*\(most recent call first\):$)", text, flags=re.MULTILINE)]
    shown = [str(stack) for stack in sorted(stacks, key=lambda stack: not stack.is_functions) if stack.frames]
    return "\n".join(shown)[:SHOWN_CHARACTERS]


class _Stack:
    def __init__(self, text: str) -> None:
        self.title, *lines = text.splitlines() or [""]
        self.frames = [line for line in lines if _FRAME.match(line)]
        ours = next((i for i, line in enumerate(self.frames) if _FRAME.match(line)[1] in _CALLERS), None)
        # The signal comes to the main thread, which may be too deep for faulthandler to reach our own frames.
        self.is_functions = ours is not None or self.title.startswith("Current thread")
        if self.is_functions:
            self.title, self.frames = "Main thread (most recent call first):", self.frames[:ours]

    def __str__(self) -> str:
        return "\n".join([f"  {self.title}", *(f"  {line}" for line in self.frames[:SHOWN_FRAMES])])
