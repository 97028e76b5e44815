"""How much memory "auto" takes where a container or a batch system allows less than the machine has."""

from __future__ import annotations

import pytest
import torch

from fastppo.rollout import memory
from fastppo.rollout.pages import kv_budget

GIB = 2**30
ELSEWHERE = {"memory.stat": "inactive_file 0\nactive_file 0\n", "memory.current": "0", "memory.max": "max"}
INSIDE = {
    "memory.max": str(4 * GIB),
    "memory.current": str(3 * GIB),
    "memory.stat": f"anon {GIB}\ninactive_file {GIB}\nactive_file {GIB // 2}\n",
}
OLD = {
    "memory.limit_in_bytes": INSIDE["memory.max"],
    "memory.usage_in_bytes": INSIDE["memory.current"],
    "memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB}\ntotal_active_file {GIB // 2}\n",
}
MACHINE = 64 * GIB


@pytest.mark.parametrize(
    ("own", "files", "free"),
    {
        "version 2, a group of its own namespace": ("0::/\n", {"": INSIDE}, 2.5),
        "version 2, the limit of a job around a step": ("0::/job/step\n", {"job": INSIDE, "job/step": ELSEWHERE}, 2.5),
        "version 2, no limit": ("0::/user\n", {"user": ELSEWHERE}, 64),
        "version 2, another's path": ("0::/docker/abc\n", {"": INSIDE}, 2.5),
        "version 2, over its limit": ("0::/\n", {"": INSIDE | {"memory.current": str(9 * GIB)}}, 0),
        "version 1": ("8:cpu:/x\n4:memory:/docker/abc\n0::/\n", {"memory/docker/abc": OLD}, 2.5),
        "version 1, no limit": ("4:memory:/\n", {"memory": OLD | {"memory.limit_in_bytes": str(2**63 - 4096)}}, 64),
        "none": ("", {}, 64),
        "no such system": (None, {}, 64),
    }.values(),
)
def test_the_limit_of_a_container_bounds_the_cache(monkeypatch, tmp_path, own, files, free):
    """psutil tells the machine's memory: "auto" took half of that, and the kernel ended the process (vllm#45086, ComfyUI#14938)."""
    for folder, content in files.items():
        (tmp_path / "groups" / folder).mkdir(parents=True, exist_ok=True)
        for name, text in content.items():
            (tmp_path / "groups" / folder / name).write_text(text)
    if own is not None:
        (tmp_path / "own").write_text(own)
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("Memory", (), {"available": MACHINE}))
    assert kv_budget("auto", torch.device("cpu")) == free * GIB // 2
