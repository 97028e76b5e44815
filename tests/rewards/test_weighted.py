"""Several rewards in one sum: weights, normalisation, and what does not apply."""

from __future__ import annotations

import math
import statistics

import pytest

from fastppo.rewards import RewardRunner, WeightedReward
from fastppo.rewards.weighted import normalised
from tests.rewards.conftest import length, score


def first(completions):
    return [1.0, None, math.nan]


def raises(completions):
    raise RuntimeError("no")


def test_the_weighted_sum_of_those_that_apply(make):
    result = score(make([WeightedReward(first, weight=2), WeightedReward(length, weight=-0.5)], None))
    assert result.scores[:2] == [2 * 1.0 - 0.5 * 3, -0.5 * 5] and math.isnan(result.scores[2])
    assert result.by_name["first"][0] == 1.0 and result.by_name["length"] == [3, 5, 5], "as the functions gave them"


def test_one_alone_may_have_a_weight(make):
    assert score(make(WeightedReward(length, weight=2.0), None)).scores == [6, 10, 10]


def test_a_weighted_reward_that_fails_is_invalid_not_zero(make):
    result = score(make([length, WeightedReward(raises, weight=0.1, normalise=True)], None, retries=0))
    assert all(map(math.isnan, result.scores)) and result.by_name["length"] == [3, 5, 5]


def test_normalised_before_the_weight(make):
    result = score(make([WeightedReward(length, weight=2, normalise=True)], None))
    deviation = statistics.pstdev([3, 5, 5])
    assert result.scores == [2 * (value - 13 / 3) / deviation for value in (3, 5, 5)]
    assert result.by_name["length"] == [3, 5, 5]


def test_normalisation_may_be_left_out_for_scores_that_are_compared(make):
    runner = make([WeightedReward(length, weight=2, normalise=True)], None)
    assert runner(["a", "b"], ["one", "three"], {}, normalise=False).scores == [6, 10]


def test_normalisation_is_over_the_valid_scores_alone(make):
    def some(completions):
        return [1.0, 3.0, None, math.nan, 1e300]

    runner = make([WeightedReward(some, normalise=True), lambda completions: [0.0] * 5], None)
    result = runner(["p"] * 5, ["x"] * 5, {})
    assert result.scores[:3] == [-1, 1, 0] and all(map(math.isnan, result.scores[3:]))


@pytest.mark.parametrize(
    "scores", [[0.1] * 3, [5.0], [0.3, 0.1 + 0.2, 0.3], [0.0, 0.0], [-1e12] * 7, [1 / 3] * 10, [1.0, 1.0 + 1e-7]]
)
def test_scores_that_do_not_vary_give_zero(scores):
    assert normalised(scores) == [0.0] * len(scores)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e12])
def test_the_scale_of_a_reward_does_not_matter(scale):
    assert normalised([-scale, scale, -scale, scale]) == [-1, 1, -1, 1]


def test_nothing_valid():
    assert normalised([]) == [] and math.isnan(normalised([math.nan])[0])


def test_a_sum_that_is_too_large_is_invalid(make):
    result = score(make(WeightedReward(length, weight=1e12), None))
    assert result.failures == 3 and "the rewards' sum is more than 1e+12" in "\n".join(result.errors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": math.nan}, "weight is nan, expected a finite number other than 0"),
        ({"weight": math.inf}, "weight is inf"),
        ({"weight": 0}, "weight is 0, .*leave the function out"),
        ({"weight": "1"}, "weight is '1', expected a number"),
        ({"weight": True}, "weight is True"),
        ({"normalise": 1}, "normalise is 1, expected True or False"),
    ],
)
def test_wrong_weights(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        WeightedReward(length, **options)


def test_what_is_no_function_is_refused_as_ever():
    with pytest.raises(TypeError, match="expected a callable"):
        RewardRunner(WeightedReward(3), timeout=None)
