"""A runner that every test closes, and what the tests of the runner say again and again."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from fastppo.rewards import RewardRunner

PROMPTS, TEXTS = ["a", "b", "c"], ["one", "three", "seven"]
PATIENCE = 10.0  # seconds for something that takes milliseconds, on a busy machine


@pytest.fixture
def make():
    runners = []

    def make_runner(functions, timeout, **options):
        runners.append(RewardRunner(functions, timeout=timeout, **options))
        return runners[-1]

    yield make_runner
    for runner in runners:
        runner.close()


def score(runner, **columns):
    return runner(PROMPTS, TEXTS, columns)


def assert_all_invalid(result, *words):
    assert all(map(math.isnan, result.scores)) and result.failures == 3
    for word in words:
        assert word in "\n".join(result.errors)


def eventually(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


def is_gone(pid):
    """Ended and reaped (a zombie still has a directory in /proc)."""
    return not Path(f"/proc/{pid}").exists()


def length(completions, **columns):
    return [len(text) for text in completions]
