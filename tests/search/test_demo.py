"""On the demo's task, with numbers of two digits: the searches by the critic solve far more than votes on as many tokens of samples."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def demo(monkeypatch):
    """examples/search.py, made small; on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in ("arithmetic", "search"):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        small = {"DIGITS": 2, "IMITATION_EPOCHS": 6, "HELD_OUT": 64, "TRAIN": 1500, "CRITIC_STEPS": 10, "SOLUTION": 21}
        for setting, value in small.items():
            if hasattr(module, setting):
                monkeypatch.setattr(module, setting, value)
    yield module
    torch.set_num_threads(threads)


def test_search_beats_as_many_tokens_of_samples(demo, tmp_path):
    solved = demo.main(["--output", str(tmp_path / "run")])
    sampled = max(solved["one sample"], solved["majority of 8"])
    assert min(solved["value-guided"], solved["PUCT"], solved["best of 8 by the critic"]) > sampled + 0.2
