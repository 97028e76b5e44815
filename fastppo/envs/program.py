"""Programs that talk to the policy as they would to any server of chat completions: commands, or functions."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import IO, Any, NamedTuple

LOOK_SECONDS = 0.05  # between looks at whether a command has ended
MOST_OUTPUT = 2**26  # bytes that a command may print
TAIL = 2**16  # bytes of what it printed that are looked at


class Task(NamedTuple):
    """What a program is given for an episode."""

    row: Mapping[str, Any]
    seed: int
    base_url: str
    api_key: str
    seconds: float
    """That it may take."""


class Ended(NamedTuple):
    """What became of it."""

    run: ProgramRun
    reward: Any
    error: BaseException | None


class AgentProgram:
    """An environment that is the user's own program: `PPOTrainer(environment=AgentProgram("python agent.py"))`. It is run once for each
    episode and asks the policy through an OpenAI client; what it was answered is the episode, and what it says in the end is the reward.

    Args:
        program: a command, as a list of words or as a shell would split it, or a function.
            A command finds `OPENAI_BASE_URL`, `OPENAI_API_KEY` and `FASTPPO_SEED` in its environment, the row as JSON on its standard input,
            and prints the reward as the last line of its standard output.
            A function `(row, base_url, api_key)`, which may be `async`, returns the reward; one with a `seed` among its parameters is given that too.

    Raises TypeError for anything else, ValueError for a command that is not there.
    """

    def __init__(self, program: str | Sequence[str] | Callable[..., Any]) -> None:
        if callable(program):
            self._act = _Function(program)
            return
        words = shlex.split(program) if isinstance(program, str) else program
        if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
            raise TypeError(f"program is {program!r}, expected a command (a text or a list of words) or a function")
        if not words:
            raise ValueError("program is empty, expected a command")
        if shutil.which(words[0], path=_path()) is None:
            raise ValueError(f"program is {program!r}, but there is no command {words[0]}")
        self._act = _Command(list(words))

    def run(self, task: Task, dropped: threading.Event) -> Any:
        """The reward as the program said it. Returns or raises soon after `dropped` is set, unless it is a function that hangs."""
        return self._act(task, dropped)


class ProgramRun:
    """A program at work on an episode, in a thread of its own, which puts an `Ended` into `inbox`."""

    def __init__(self, program: AgentProgram, task: Task, inbox: SimpleQueue[Any]) -> None:
        self._program, self._task, self._inbox = program, task, inbox
        self._dropped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="fastppo environment program", daemon=True)
        self._thread.start()

    def drop(self) -> None:
        """What it comes to no longer counts; a command is killed."""
        self._dropped.set()

    def join(self, seconds: float) -> bool:
        """Whether its thread has ended, or does so in this time."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            reward, error = self._program.run(self._task, self._dropped), None
        except BaseException as raised:  # also SystemExit: it ends an episode, not the run
            reward, error = None, raised
        self._inbox.put(Ended(self, reward, error))


class _Function:
    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        parameters = inspect.signature(function).parameters
        self._takes_seed = "seed" in parameters
        try:
            inspect.signature(function).bind(None, "", "", **({"seed": 0} if self._takes_seed else {}))
        except TypeError as error:
            raise TypeError(
                f"program is a function that cannot be called as (row, base_url, api_key): {error}"
            ) from error

    def __call__(self, task: Task, dropped: threading.Event) -> Any:
        more = {"seed": task.seed} if self._takes_seed else {}
        said = self._function(_own(task.row), task.base_url, task.api_key, **more)
        return asyncio.run(_within(said, task.seconds)) if inspect.isawaitable(said) else said


async def _within(said: Any, seconds: float) -> Any:
    return await asyncio.wait_for(said, seconds)


class _Command:
    def __init__(self, words: list[str]) -> None:
        self._words = words

    def __call__(self, task: Task, dropped: threading.Event) -> float:
        variables = {"OPENAI_BASE_URL": task.base_url, "OPENAI_API_KEY": task.api_key, "FASTPPO_SEED": str(task.seed)}
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as errors:
            given.write(json.dumps(_own(task.row), default=str).encode())
            given.seek(0)
            process = subprocess.Popen(
                self._words,
                stdin=given,
                stdout=printed,
                stderr=errors,
                env=os.environ | {"PATH": _path()} | variables,
                start_new_session=True,  # a process group of its own, all of which can be killed
            )
            try:
                _await_end(process.pid, [printed, errors], task.seconds, dropped)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with what it has started; before its number is free again
                process.wait()
            if process.returncode:
                why = _last_line(errors)
                raise RuntimeError(f"it ended {_how(process.returncode)}" + (f": {why}" if why else ""))
            return _as_number(_last_line(printed))


def _await_end(pid: int, outputs: list[IO[bytes]], seconds: float, dropped: threading.Event) -> None:
    """Until a process has ended, which still is to be waited for. Raises TimeoutError or ValueError where it is to be killed."""
    deadline = time.monotonic() + seconds
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > deadline or dropped.wait(LOOK_SECONDS):
            raise TimeoutError
        if any(os.fstat(output.fileno()).st_size > MOST_OUTPUT for output in outputs):
            raise ValueError(f"it printed more than {MOST_OUTPUT} bytes")


def _as_number(line: str) -> float:
    try:
        return float(line)
    except ValueError:
        raise ValueError(f"the last line that it printed is {line!r}, expected a number, the reward") from None


def _last_line(output: IO[bytes]) -> str:
    """ "" where nothing was printed."""
    output.seek(max(0, os.fstat(output.fileno()).st_size - TAIL))
    lines = output.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _how(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def _own(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of the data."""
    return {name: value for name, value in row.items() if name != "prompt_ids"}


def _path() -> str:
    """Where commands are looked for: `python` is the one that runs this."""
    return os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
