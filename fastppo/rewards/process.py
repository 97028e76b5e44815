"""A function in a process that can be killed: after a time limit, with all that it started, and with no zombie left.

    trainer --pipe--> keeper --pipe--> worker (--> whatever the function starts)

This is the trainer's side; `keeper.py` has the other two. Requests go down as bytes of the caller's making. Replies are JSON: the
function may run text that a model wrote, and nothing that such a process sends may be able to run here.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import weakref
from multiprocessing.connection import Connection, Pipe
from typing import Any

from fastppo.rewards.keeper import CANCEL, MAX_REPLY_BYTES, QUIT, ProcessFailure, Serve, fork, keep
from fastppo.rewards.pools import pools_of_this_process

GRACE = 10.0  # seconds a keeper may take beyond the time limit, to fork and to kill
CLOSE_GRACE = 2.0  # seconds it may take to give up a request, or to end
SHOWN_THREADS = 5

_open_pipes: weakref.WeakSet[Connection] = weakref.WeakSet()


def supported() -> bool:
    """Whether this platform can fork and watch processes as needed here (Linux, the BSDs)."""
    return hasattr(os, "fork") and hasattr(os, "waitid")


class KillableProcess:
    """`serve(request) -> JSON-able dict` in a forked worker. One request at a time; any thread may make it.

    Args:
        serve: runs in the worker, which keeps its state between requests and loses it when it is killed.
        timeout: seconds before a request is given up and the worker is killed with everything it started.
    """

    def __init__(self, serve: Serve, timeout: float) -> None:
        self._serve, self._timeout = serve, timeout
        self._pipe: Connection | None = None
        self._owner = self._keeper = 0
        self._waiting = False
        self._start()

    def send(self, request: bytes) -> None:
        """Begin a request; `receive` or `cancel` must follow."""
        if self._pipe is None or self._owner != os.getpid():  # closed, or copied into a fork of its owner
            self._start()
        self._waiting = True
        try:
            self._pipe.send_bytes(request)
        except OSError:  # the keeper was killed from outside
            self.close()
            self._start()
            self._waiting = True
            self._pipe.send_bytes(request)

    def receive(self) -> dict[str, Any]:
        """What `serve` returned. Raises ProcessFailure with the reason why not; the next request finds a fresh worker."""
        reply = self._reply(self._timeout + GRACE)
        try:
            answer = json.loads(reply)
        except ValueError as error:
            raise ProcessFailure(f"its process sent something other than JSON: {error}") from error
        if not isinstance(answer, dict):
            raise ProcessFailure("its process sent something other than an answer")
        if "failure" in answer:
            raise ProcessFailure(str(answer["failure"]))
        return answer

    def cancel(self) -> None:
        """Give up a request that was sent and not received (Ctrl-C): kills the worker. Without one, does nothing."""
        if not self._waiting:
            return
        try:
            self._pipe.send_bytes(CANCEL)
            self._reply(CLOSE_GRACE)
        except (OSError, ProcessFailure):
            self.close()

    def close(self) -> None:
        """Kill and reap everything; a later `send` starts anew."""
        if self._pipe is not None:
            self._finalizer()
            self._pipe, self._waiting = None, False

    def _start(self) -> None:
        self._owner = os.getpid()
        self._pipe, theirs = Pipe()
        _open_pipes.add(self._pipe)
        # A copy of a trainer's end in the new keeper would hide from the other keepers that the trainer is gone.
        not_mine, pools = list(_open_pipes), pools_of_this_process()
        self._keeper = fork(keep, self._serve, self._timeout, theirs, not_mine, self._owner, pools, _advice())
        theirs.close()
        self._finalizer = weakref.finalize(self, _stop_keeper, self._keeper, self._pipe, self._owner)

    def _reply(self, patience: float) -> bytes:
        try:
            if self._pipe.poll(patience):
                reply = self._pipe.recv_bytes(MAX_REPLY_BYTES)
                self._waiting = False
                return reply
        except (EOFError, OSError) as error:
            self.close()
            raise ProcessFailure("the process that watches it was killed") from error
        os.kill(self._keeper, signal.SIGKILL)
        self.close()
        raise ProcessFailure("the process that watches it does not answer")


def _advice() -> str:
    """What to do about a function that took too long."""
    text = (
        "  If it only needs longer, raise reward.timeout; reward.timeout=None calls it in the trainer's process, where a debugger "
        "can follow it."
    )
    lost = [thread.name for thread in threading.enumerate() if thread is not threading.current_thread()]
    if lost:
        shown = ", ".join(map(repr, lost[:SHOWN_THREADS])) + (", ..." if len(lost) > SHOWN_THREADS else "")
        text += (
            f"\n  The trainer had other threads ({shown}) when it forked this process, which has none of them: a function that "
            "waits for one must start it itself, at its first call."
        )
    return text


def _stop_keeper(pid: int, pipe: Connection, owner: int) -> None:
    """Ask the keeper to end, kill it if it does not, reap it. In a fork of the owner: only close the copied pipe."""
    is_owner = os.getpid() == owner
    if is_owner:
        with contextlib.suppress(OSError):
            pipe.send_bytes(QUIT)
    pipe.close()
    if is_owner and not _reaped(pid, CLOSE_GRACE):
        os.kill(pid, signal.SIGKILL)
        _reaped(pid, CLOSE_GRACE)


def _reaped(pid: int, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return True
        except ChildProcessError:  # someone here waits for any child, and got it first
            return True
        time.sleep(0.002)
    return False
