"""Memory that this process may still take, where a container or a batch system allows it less than the machine has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

# By version of the interface: the files with the limit and the usage, and the entries of memory.stat for what files take.
NAMES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
    2: ("memory.max", "memory.current", ("inactive_file", "active_file")),
}


def free_memory() -> int:
    """Bytes: the machine's available memory, or what is left in this process's control groups (Docker, Kubernetes, Slurm) where that is
    less; /proc/meminfo does not know of those."""
    return max(0, min([psutil.virtual_memory().available, *_left_in_groups()]))


def _left_in_groups() -> Iterator[int]:
    """Of each group with a limit. What files take of it counts as left: the kernel gives that back."""
    for group, version in _memory_groups():
        limit, usage, files = NAMES[version]
        try:
            statistics = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
            cached = sum(int(statistics[name]) for name in files)
            yield int((group / limit).read_text()) - int((group / usage).read_text()) + cached
        except (OSError, ValueError, KeyError):  # no such group here, or its limit is "max"
            continue


def _memory_groups() -> Iterator[tuple[Path, int]]:
    """(folder, version of the interface) of this process's group and of those around it: the tightest limit counts."""
    try:
        lines = OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" or "memory" in controllers.split(","):
            version, root = (2, GROUPS) if number == "0" else (1, GROUPS / "memory")
            own = root / path.lstrip("/")
            for group in (own, *own.parents):
                if group.is_relative_to(root):
                    yield group, version
