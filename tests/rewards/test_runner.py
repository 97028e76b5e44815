"""RewardRunner: what functions are given, what they may return, and that a failure is an invalid score: counted, explained, never a 0."""

from __future__ import annotations

import math
import sys
import threading
from functools import partial

import numpy as np
import pytest
import torch

from fastppo.rewards import RewardRunner
from tests.rewards.conftest import PROMPTS, TEXTS, assert_all_invalid, length, score


@pytest.fixture(params=[20.0, None], ids=["forked", "in-process"])
def timeout(request):
    return request.param


# What functions are given


def test_scores_and_names(make, timeout):
    result = score(make(length, timeout))
    assert result.scores == [3.0, 5.0, 5.0] and result.by_name == {"length": [3.0, 5.0, 5.0]}
    assert (result.failures, result.errors) == (0, [])


def test_only_named_keywords_are_passed(make, timeout):
    def by_name(prompts, completions, answer):
        return [float(a == t) for a, t in zip(answer, completions, strict=True)]

    def all_of_them(**everything):
        assert sorted(everything) == ["answer", "completion_ids", "completions", "level", "prompts"]
        return everything["level"]

    def ids_only(completion_ids):
        return [sum(ids) for ids in completion_ids]

    runner = make([by_name, all_of_them, ids_only], timeout)
    result = runner(
        PROMPTS, TEXTS, {"answer": ["one", "x", "seven"], "level": [1, 2, 3]}, completion_ids=[[1], [2, 3], []]
    )
    assert result.by_name == {"by_name": [1, 0, 1], "all_of_them": [1, 2, 3], "ids_only": [1, 5, 0]}
    assert result.scores == [3, 7, 4]


def test_unknown_column_is_the_callers_error(make, timeout):
    def wants(completions, answr):
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match=r"'wants' asks for 'answr'.*did you mean 'answer'"):
        score(make(wants, timeout), answer=[1, 2, 3])


def test_a_default_stands_in_for_a_column(make, timeout):
    def scaled(completions, scale=2.0):
        return [scale] * len(completions)

    runner = make(scaled, timeout)
    assert score(runner).scores == [2, 2, 2]


def test_conversations(make, timeout):
    def check(prompts, completions):
        assert prompts[0] == [{"role": "user", "content": "a"}]
        return [len(message["content"]) for (message,) in completions if message["role"] == "assistant"]

    runner = make(check, timeout)
    assert runner([[{"role": "user", "content": p}] for p in PROMPTS], TEXTS, {}).scores == [3, 5, 5]


def test_async_function(make, timeout):
    async def slow(completions):
        import asyncio

        await asyncio.sleep(0.001)
        return [len(text) for text in completions]

    assert score(make(slow, timeout)).scores == [3, 5, 5]


def test_async_function_inside_a_running_loop(make):
    import asyncio

    async def one(completions):
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    async def notebook():
        return score(make(one, None))

    assert asyncio.run(notebook()).scores == [1, 1, 1]


def test_partials_objects_and_namesakes(make, timeout):
    class Bonus:
        def __call__(self, completions, **columns):
            return [1] * len(completions)

    def power(completions, exponent, **columns):
        return [2**exponent] * len(completions)

    runner = make([partial(power, exponent=3), Bonus(), length, length], timeout)
    assert list(score(runner).by_name) == ["power", "Bonus", "length", "length_2"]
    assert score(runner, exponent=[1, 2, 3]).scores == [15, 19, 19], "no column replaces what is bound"


# What functions return


@pytest.mark.parametrize(
    "returned",
    [
        lambda: (1, 0, 2),
        lambda: np.array([1.0, 0.0, 2.0], dtype=np.float32),
        lambda: [np.float32(1), np.int64(0), np.float64(2)],
        lambda: torch.tensor([1, 0, 2], dtype=torch.bfloat16, requires_grad=False),
        lambda: [torch.tensor(1.0, requires_grad=True), torch.tensor(0), 2],
        lambda: (x for x in (True, False, 2)),
    ],
    ids=["tuple", "array", "numpy scalars", "tensor", "0-d tensors", "generator of bool"],
)
def test_anything_that_is_a_list_of_numbers(make, timeout, returned):
    def reward(completions):
        return returned()

    result = score(make(reward, timeout))
    assert result.scores == [1.0, 0.0, 2.0] and all(type(value) is float for value in result.scores)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1.0, 2.0], ["returned 2 scores, expected 3"]),
        ([1.0] * 4, ["returned 4 scores, expected 3"]),
        (torch.zeros(3, 1), ["Tensor of shape (3, 1), expected (3,)"]),
        ([1.0, "2", 3.0], ["str '2' for completion 1"]),
        ([1.0, 2 + 1j, 3.0], ["complex"]),
        (1.0, ["float 1.0", "expected a list of 3"]),
        (torch.tensor(1.0), ["expected"]),
        (None, ["None", "expected a list of 3"]),
        ("123", ["str '123'"]),
        ({0: 1.0, 1: 1.0, 2: 1.0}, ["dict"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_anything_else_is_invalid(make, timeout, returned, words):
    def reward(completions):
        return returned

    assert_all_invalid(score(make(reward, timeout, retries=0)), "reward 'reward' failed (attempt 1 of 1)", *words)


def test_nan_and_infinity_are_invalid_one_by_one(make, timeout):
    def reward(completions):
        return [math.nan, 1.0, 10**400]

    result = score(make([reward, length], timeout))
    assert math.isnan(result.scores[0]) and result.scores[1] == 6 and math.isnan(result.scores[2])
    assert (
        result.failures == 2
        and "NaN or infinity for 2 of 3 completions, the first of them number 0" in result.errors[0]
    )


def test_none_means_not_applicable(make, timeout):
    def first(completions):
        return [1.0, None, None]

    def second(completions):
        return [10.0, 20.0, None]

    result = score(make([first, second], timeout))
    assert result.scores[:2] == [11.0, 20.0] and math.isnan(result.scores[2]) and math.isnan(result.by_name["first"][1])
    assert result.failures == 1 and "no reward applies" in result.errors[0]


# How functions fail


def raises(completions):
    raise RuntimeError("the grader is out of cheese")


def test_an_exception_is_invalid_and_explained(make, timeout):
    result = score(make([raises, length], timeout, retries=2))
    assert_all_invalid(
        result, "'raises'", "attempt 3 of 3", "RuntimeError: the grader is out of cheese", "in raises", __file__
    )
    assert len(result.errors) == 3 and result.by_name["length"] == [3, 5, 5]


def test_a_retry_makes_it_good(make, timeout, tmp_path):
    def flaky(completions):
        (tmp_path / "calls").open("a").write("x")
        if len((tmp_path / "calls").read_text()) == 1:
            raise OSError("connection reset")
        return [1.0] * len(completions)

    result = score(make([length, flaky], timeout, retries=1))
    assert result.scores == [4, 6, 6] and result.failures == 0
    assert len(result.errors) == 1 and "connection reset" in result.errors[0]


def test_sys_exit_does_not_end_the_run(make, timeout):
    def leaves(completions):
        sys.exit(3)

    assert_all_invalid(score(make(leaves, timeout)), "SystemExit")


# Arguments


@pytest.mark.parametrize(
    ("functions", "options", "error", "words"),
    [
        ([], {}, ValueError, "functions is empty"),
        (3, {}, TypeError, "functions is int"),
        ([length, 3], {}, TypeError, "expected a callable"),
        (length, {"timeout": 0}, ValueError, "timeout is 0"),
        (length, {"timeout": math.inf}, ValueError, "timeout is inf"),
        (length, {"timeout": "60"}, ValueError, "timeout is '60'"),
        (length, {"retries": -1}, ValueError, "retries is -1"),
        (lambda completions, /: [], {}, ValueError, "by position only"),
    ],
)
def test_construction_errors(functions, options, error, words):
    with pytest.raises(error, match=words):
        RewardRunner(functions, **({"timeout": None} | options))


@pytest.mark.parametrize(
    ("prompts", "columns", "ids", "error", "words"),
    [
        (["a"], {}, None, ValueError, "prompts has 1 entries, expected 3"),
        (PROMPTS, {"answer": [1]}, None, ValueError, "answer has 1 entries, expected 3"),
        (PROMPTS, {}, [[1]], ValueError, "completion_ids has 1 entries"),
        (PROMPTS, {"completions": TEXTS}, None, ValueError, "columns has 'completions'"),
        ([1, 2, 3], {}, None, TypeError, "a prompt is int"),
    ],
)
def test_call_errors(make, prompts, columns, ids, error, words):
    with pytest.raises(error, match=words):
        make(length, None)(prompts, TEXTS, columns, completion_ids=ids)


def test_completions_must_be_texts(make):
    with pytest.raises(TypeError, match=r"completions\[1\] is NoneType"):
        make(length, None)(PROMPTS, ["x", None, "y"], {})


def test_a_column_that_cannot_be_sent(make):
    with pytest.raises(TypeError, match="cannot be sent to the process of reward 'length'"):
        score(make(length, 20.0), thing=[threading.Lock()] * 3)


def test_no_completions(make, timeout):
    result = make(raises, timeout)([], [], {})
    assert (result.scores, result.by_name, result.failures, result.errors) == ([], {"raises": []}, 0, [])
