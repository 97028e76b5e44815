"""Networks of their own for processes: one that nobody else uses, and two machines in one, with a cable that a test can pull."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import pytest

_numbers = count()


def in_a_network_of_its_own(*words: str) -> list[str]:
    """What runs `words` with a loopback device that nobody else uses. Skips the test where that cannot be."""
    network = ["unshare", "--map-root-user", "--net"]
    if not shutil.which("ip") or subprocess.run([*network, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network namespace may be made here")
    return [*network, "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *words]


class TwoNodes:
    """Network namespaces "0" and "1" of which each has the device `eth`, with the addresses `ADDRESSES`, and its own loopback."""

    ADDRESSES = ("10.213.7.1", "10.213.7.2")
    DEVICE = "eth"

    def __init__(self) -> None:
        """Raises RuntimeError where the kernel, or the lack of a right, forbids it; nothing is left then."""
        if not shutil.which("ip"):
            raise RuntimeError("ip is not installed (iproute2)")
        own = f"fastppo-{os.getpid()}-{next(_numbers)}"
        self._names = [f"{own}-{node}" for node in range(2)]
        try:
            for name in self._names:
                _ip("netns", "add", name)
            first, second = self._names
            ends = ["link", "add", self.DEVICE, "type", "veth", "peer", "name", self.DEVICE, "netns", second]
            _ip("-n", first, *ends)
            for name, address in zip(self._names, self.ADDRESSES, strict=True):
                _ip("-n", name, "addr", "add", f"{address}/24", "dev", self.DEVICE)
                for device in ("lo", self.DEVICE):
                    _ip("-n", name, "link", "set", device, "up")
        except RuntimeError:
            self.close()
            raise

    def command(self, node: int, *words: str) -> list[str]:
        """What runs `words` on a node."""
        return ["ip", "netns", "exec", self._names[node], *words]

    def cut(self) -> None:
        """Nothing comes through any more, and nobody is told."""
        _ip("-n", self._names[0], "link", "set", self.DEVICE, "down")

    def close(self) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """Skips the test, with the reason, where no namespaces can be made."""
    try:
        nodes = TwoNodes()
    except RuntimeError as error:
        pytest.skip(f"no network namespaces that are joined: {error}")
    try:
        yield nodes
    finally:
        nodes.close()


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
