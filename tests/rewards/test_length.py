"""DAPO's soft overlong punishment, at its corners."""

from __future__ import annotations

from functools import partial

import pytest

from fastppo.rewards import RewardRunner, soft_overlong


def test_the_line_of_the_paper():
    """Equation 13 with L = 20480, C = 4096, the paper's own."""
    lengths = [0, 16384, 16385, 18432, 20479, 20480, 20481, 50000]
    scores = soft_overlong([range(n) for n in lengths], max_completion_len=20480, soft_punish_cache=4096)
    assert scores == [0, 0, -1 / 4096, -1 / 2, -4095 / 4096, -1, -1, -1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "reward 'soft_overlong' needs max_completion_len: bind it with functools.partial"),
        ({"max_completion_len": 10}, "needs soft_punish_cache"),
        ({"max_completion_len": 10, "soft_punish_cache": 11}, "soft_punish_cache is 11, expected at most .* = 10"),
        ({"max_completion_len": 10, "soft_punish_cache": 0}, "soft_punish_cache is 0, expected an integer >= 1"),
        ({"max_completion_len": "10", "soft_punish_cache": 1}, "max_completion_len is '10'"),
    ],
)
def test_options_are_checked_when_the_runner_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        RewardRunner(partial(soft_overlong, **options), timeout=None)


def test_lengths_are_tokens(make):
    runner = make(partial(soft_overlong, max_completion_len=4, soft_punish_cache=2), None)
    assert runner(["p"] * 2, ["x" * 100, "x"], {}, completion_ids=[[1], [1, 2, 3]]).scores == [0, -0.5]
