"""The share of n-grams that come again."""

from __future__ import annotations

from functools import partial

import pytest

from fastppo.rewards import RewardRunner, repetition


@pytest.mark.parametrize(
    ("text", "n", "score"),
    [
        ("", 3, 0),
        ("very", 3, 0),
        ("very nice", 3, 0),
        ("very very", 3, -1 / 2),
        ("Very very very", 3, -1 / 2),
        ("very " * 12, 3, -9 / 10),
        ("a b c a b c", 3, -1 / 4),
        ("a b c a b c", 2, -2 / 5),
        ("a b c a b c", 1, -1 / 2),
        ("!!!!!", 3, -2 / 3),
        ("好好好好好", 3, -2 / 3),
        ("the cat sat on the mat with the dog", 3, 0),
    ],
)
def test_scores(text, n, score):
    assert repetition([text], n=n) == [score]


def test_more_repetition_is_worse():
    scores = repetition(["very " * count for count in range(1, 30)])
    assert scores == sorted(scores, reverse=True) and len(set(scores[3:])) == len(scores[3:])


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "3"])
def test_a_wrong_n_is_named_when_the_runner_is_made(n):
    with pytest.raises(ValueError, match="reward 'repetition': n is .*, expected an integer >= 1"):
        RewardRunner(partial(repetition, n=n), timeout=None)


def test_an_option_that_it_has_not_is_no_column():
    with pytest.raises(ValueError, match="reward 'repetition' has no option 'size', expected n"):
        RewardRunner(partial(repetition, size=2), timeout=None)
