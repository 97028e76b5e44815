"""A tool that runs Python code of a model in a process of its own, which has limits and no network.

What it is: a fresh interpreter for each call, in a new empty folder and with an empty environment. Linux (seccomp) refuses it sockets, new
processes and signals to others; the kernel limits its memory, its processor time and the size of files; it is killed at its time limit and
where it prints too much.

What it is not: a container or a virtual machine. The code runs as this user: it can read what the user may read, and write where the user may
write; it may look for holes in the kernel. Whoever lets a model write code runs the whole training in a container that holds nothing of value.
"""

from __future__ import annotations

import contextlib
import os
import platform
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fastppo.envs.confined import CALLS

MAX_CODE_BYTES = 100_000  # Linux takes 128 KiB as one argument
EXIT_SECONDS = 0.5  # between the end of what it prints and its own


class PythonSandbox:
    """`PythonSandbox().python` is a tool: `Tools(PythonSandbox(seconds=2).python)`. For Linux on x86-64 or ARM64.

    Args:
        seconds: of wall-clock time, after which it is killed; of processor time it gets as much.
        memory: most bytes of its address space.
        output: most characters that the model gets to read.

    Raises:
        ValueError: a limit that is none. RuntimeError: another platform, where nothing would hold the code back.
    """

    def __init__(self, *, seconds: float = 5.0, memory: int = 512 * 2**20, output: int = 2000) -> None:
        for name, value in (("seconds", seconds), ("memory", memory), ("output", output)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name} is {value!r}, expected a number > 0")
        if sys.platform != "linux" or platform.machine() not in CALLS:
            raise RuntimeError(
                f"this is {sys.platform} on {platform.machine()}, expected Linux on x86_64 or aarch64 for a sandbox"
            )
        self._seconds, self._memory, self._output = float(seconds), int(memory), int(output)

    def python(self, code: str) -> str:
        """
        Runs Python code in a fresh interpreter without network and returns what it prints.

        Args:
            code: The code. Only what it prints is returned.

        Returns:
            What was printed, errors included.
        """
        if len(code.encode()) > MAX_CODE_BYTES or "\0" in code:
            raise ValueError(f"the code has more than {MAX_CODE_BYTES} bytes, or one that is 0")
        script = Path(__file__).with_name("confined.py")
        limits = [str(max(1, round(self._seconds + 0.5))), str(self._memory)]
        with tempfile.TemporaryDirectory(prefix="fastppo-sandbox-") as folder:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(script), *limits, code],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"},
                start_new_session=True,
            )
            try:
                return self._read(process)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.stdout.close()
                process.wait()

    def _read(self, process: subprocess.Popen) -> str:
        """What it prints until it ends, or has printed or lasted too long."""
        found, deadline, most = b"", time.monotonic() + self._seconds, 4 * self._output
        os.set_blocking(process.stdout.fileno(), False)
        with selectors.DefaultSelector() as ready:
            ready.register(process.stdout, selectors.EVENT_READ)
            while len(found) <= most:
                if not ready.select(max(0.0, deadline - time.monotonic())):
                    return f"{self._shown(found)}\n(killed: it took longer than {self._seconds:g} s)"
                piece = process.stdout.read(most)
                if not piece:
                    break
                found += piece
        if len(found) > most:
            return f"{self._shown(found)}\n(killed: it printed too much)"
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(EXIT_SECONDS)
            if status < 0:
                return f"{self._shown(found)}\n(killed by {signal.Signals(-status).name})"
        return self._shown(found)

    def _shown(self, found: bytes) -> str:
        text = found.decode("utf-8", "replace")
        return (
            text if len(text) <= self._output else f"{text[: self._output]}\n(cut off after {self._output} characters)"
        )


def python(code: str) -> str:
    """
    Runs Python code in a fresh interpreter without network and returns what it prints.

    Args:
        code: The code. Only what it prints is returned.

    Returns:
        What was printed, errors included.
    """
    return PythonSandbox().python(code)
