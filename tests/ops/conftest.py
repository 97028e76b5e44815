"""A process that tests the kernels of a GPU on a CPU leaves out what calls none of them: errors of arguments, references, the CPU's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import DEVICE, FAST_BACKEND

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if FAST_BACKEND == "cpu" or DEVICE:
        return
    kept, left_out = [], []
    for item in items:
        calls_none = item.path.parent == HERE and {"backend", "fast_backend"}.isdisjoint(item.fixturenames)
        (left_out if calls_none else kept).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept
