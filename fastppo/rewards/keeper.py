"""The keeper, which watches, and the worker, which runs the function; `process.py` explains the three processes.

The keeper is forked once, early. It starts no thread and runs no foreign code, so it can fork a fresh worker at any time: forking the
trainer itself later would copy locks that other threads hold, a CUDA context, and every page of weights that changes afterwards. It
reaps what it kills, and it notices when the trainer dies. The worker runs the function on its main thread, in a process group of its
own, and serves until it must be killed; before it is killed for taking too long, it says where it hangs.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import torch

from fastppo.rewards import stacks
from fastppo.rewards.pools import restart_at_first_use

Serve = Callable[[bytes], dict[str, Any]]

CANCEL, QUIT = b"C", b"Q"  # no request is like them: those are pickles, which begin with 0x80
MAX_REPLY_BYTES = 1 << 28
BUSY_TICK = 0.1  # seconds between looks at whether the worker or the trainer has died
IDLE_TICK = 1.0
KILL_SECONDS = 1.0

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


class ProcessFailure(Exception):
    """The function gave no answer: it took too long, or its process died. The text says which."""


class TookTooLong(ProcessFailure):
    """It was still at work when its time was over."""


def fork(run: Callable[..., None], *arguments: Any) -> int:
    """The child's pid; the child calls `run`, then leaves without the exit handlers of the process that it copies."""
    _flush()  # or both would write what is in the buffers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # "multi-threaded": what that can break, neither child uses
        pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        gc.freeze()  # objects copied from the trainer (CUDA tensors, say) must not be finalised here
        _reset_signals()
        run(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        _flush()
        os._exit(status)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _reset_signals() -> None:
    """Drop handlers inherited from the trainer. Ctrl-C is the trainer's to handle."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGALRM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def keep(
    serve: Serve,
    timeout: float,
    trainer: Connection,
    not_mine: list[Connection],
    trainer_pid: int,
    pools: list[Any],
    advice: str,
) -> None:
    """The keeper's life: hand requests to a worker until the trainer quits, closes the pipe or dies.

    pools: those of the trainer's process. advice: what to say of a function that hangs, after where it hangs.
    """
    restart_at_first_use(pools)
    os.setpgid(0, 0)  # a signal to the trainer's group must not end the keeper before it has cleaned up
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    for pipe in not_mine:
        pipe.close()
    worker: _Worker | None = None
    while (request := _next_message(trainer, trainer_pid, worker)) != QUIT:
        if request == CANCEL:  # obeyed already, or too late
            continue
        if worker is not None and worker.has_exited():
            worker = worker.kill()
        worker = worker or _Worker(serve, trainer)
        try:
            reply = worker.ask(request, timeout, lambda: trainer.poll() or os.getppid() != trainer_pid)
        except TookTooLong as failure:
            reason = f"{failure}{worker.where_it_hangs()}\n{advice}"
            worker, reply = worker.kill(), _failure(reason)
        except ProcessFailure as failure:
            worker, reply = worker.kill(), _failure(str(failure))
        with contextlib.suppress(OSError):
            trainer.send_bytes(reply)
    if worker is not None:
        worker.kill()


def _failure(reason: str) -> bytes:
    return json.dumps({"failure": reason}).encode()


def _next_message(trainer: Connection, trainer_pid: int, worker: _Worker | None) -> bytes:
    while os.getppid() == trainer_pid:
        try:
            if trainer.poll(IDLE_TICK):
                return trainer.recv_bytes()
        except (EOFError, OSError):
            break
        if worker is not None:
            worker.reap_orphans()
    return QUIT


class _Worker:
    """The keeper's side of one worker process, the leader of its own process group."""

    def __init__(self, serve: Serve, trainer: Connection) -> None:
        self._pipe, theirs = Pipe()
        self._stacks, write_end = os.pipe()
        self._pid = fork(_work, serve, theirs, [self._pipe, trainer], os.getpid(), write_end)
        with contextlib.suppress(
            OSError
        ):  # both sides do it: whoever comes first, the group is there before it is needed
            os.setpgid(self._pid, self._pid)
        theirs.close()
        os.close(write_end)

    def ask(self, request: bytes, timeout: float, interrupted: Callable[[], bool]) -> bytes:
        """The worker's reply. Raises ProcessFailure; then only `kill` is left to do."""
        deadline = time.monotonic() + timeout
        try:
            self._pipe.send_bytes(request)
            while not self._pipe.poll(max(0.0, min(BUSY_TICK, deadline - time.monotonic()))):
                if interrupted():
                    raise ProcessFailure("interrupted")
                if self.has_exited() and not self._pipe.poll():  # what it started may still hold the pipe open
                    raise ProcessFailure(self._last_words())
                if time.monotonic() >= deadline:
                    raise TookTooLong(f"no answer within {timeout:g} s: its process was killed")
            return self._pipe.recv_bytes(MAX_REPLY_BYTES)
        except (EOFError, OSError):
            raise ProcessFailure(self._last_words()) from None

    def where_it_hangs(self) -> str:
        """To be appended to a message; "" where it does not say."""
        found = stacks.ask(self._pid, self._stacks)
        return f". It was here:\n{found}" if found else ""

    def has_exited(self) -> bool:
        return self._state() is not None

    def kill(self) -> None:
        """SIGKILL for the worker, its process group and whatever left that group; reaps them all."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        self._pipe.close()
        os.close(self._stacks)
        deadline = time.monotonic() + KILL_SECONDS
        while (orphans := _children()) and time.monotonic() < deadline:  # killing one makes orphans of its children
            for pid in orphans:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def reap_orphans(self) -> None:
        """Processes that outlived the one that started them come to the keeper; take note of those that ended."""
        for pid in _children():
            if pid != self._pid:
                os.waitpid(pid, os.WNOHANG)

    def _state(self) -> os.waitid_result | None:
        # Without reaping: until then the kernel gives neither the process id nor its group to anyone else.
        return os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)

    def _last_words(self) -> str:
        deadline = time.monotonic() + BUSY_TICK  # the pipe breaks a little before the exit can be seen
        while (state := self._state()) is None and time.monotonic() < deadline:
            time.sleep(0.001)
        if state is None:
            return "its process closed the pipe"
        if state.si_code == os.CLD_EXITED:
            return f"its process exited with status {state.si_status}"
        return f"its process was killed by signal {state.si_status} ({signal.strsignal(state.si_status)})"


def _work(serve: Serve, keeper: Connection, not_mine: list[Connection], keeper_pid: int, stack_pipe: int) -> None:
    """The worker's life: answer requests until the keeper is gone."""
    os.setpgid(0, 0)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != keeper_pid:  # it died before the call
        return
    for pipe in not_mine:
        pipe.close()
    stacks.write_at_signal(stack_pipe)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a background process that reads the terminal would be stopped
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # the threads of the tokenizers library did not survive the fork
    torch.set_num_threads(1)  # nor did OpenMP's: a parallel region would wait for them for ever
    pid = os.getpid()
    while True:
        try:
            request = keeper.recv_bytes()
        except (EOFError, OSError):
            return
        reply = json.dumps(serve(request)).encode()
        if os.getpid() != pid:  # the function forked, and its child came back here
            return
        _flush()
        keeper.send_bytes(reply)


def _children() -> list[int]:
    """Process ids of this (single-threaded) process's children; none where the platform does not list them."""
    try:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    except OSError:
        return []


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)
