"""What the runner owes to functions as users have them: state, other return types, and that nothing one does reaches another or the data."""

from __future__ import annotations

import functools
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from fastppo.rewards import RewardRunner
from fastppo.rewards.result import LARGEST_SCORE
from tests.rewards.conftest import PROMPTS, TEXTS, assert_all_invalid, eventually, is_gone, length, score


@pytest.fixture(params=[20.0, None], ids=["forked", "in-process"])
def timeout(request):
    return request.param


# Callables with state


class Counter:
    def __init__(self):
        self.calls = 0

    def __call__(self, completions):
        self.calls += 1
        return [self.calls] * len(completions)

    def method(self, completions, **columns):
        return self(completions)

    @classmethod
    def of_class(cls, completions):
        cls.total = getattr(cls, "total", 0) + 1
        return [cls.total] * len(completions)


class AsyncCounter(Counter):
    async def __call__(self, completions):
        return Counter.__call__(self, completions)


def counts_in(calls, completions):
    calls.append(1)
    return [len(calls)] * len(completions)


def generator_of_scores():
    count = 0
    while True:
        count += 1
        yield count


def as_generator():
    counts = generator_of_scores()
    return lambda completions: [next(counts)] * len(completions)


def decorated():
    counter = Counter()

    @functools.wraps(length)  # its signature is that of `length`
    def reward(*arguments, **keywords):
        return counter(keywords["completions"])

    return reward


@pytest.mark.parametrize(
    "make_function",
    [
        Counter,
        AsyncCounter,
        lambda: Counter().method,
        lambda: type("Own", (Counter,), {}).of_class,
        lambda: functools.partial(counts_in, []),
        lambda: functools.partial(Counter().method),
        as_generator,
        decorated,
    ],
    ids=["object", "async object", "method", "class method", "partial", "partial of a method", "closure", "decorated"],
)
def test_state_lasts_from_call_to_call(make, timeout, make_function):
    runner = make(make_function(), timeout, retries=0)
    assert [score(runner).scores for _ in range(3)] == [[n] * 3 for n in (1, 2, 3)]


# What is refused at construction


class Judge(torch.nn.Module):
    def forward(self, completions):
        return torch.zeros(len(completions))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (Judge(), "is a model, Judge, expected a function that asks it"),
        (functools.partial(Judge(), 1), "is a model, Judge"),
        ([length, Judge()], "is a model, Judge"),
        (Counter, r"is the class Counter, expected .* Counter\(\.\.\.\)"),
        (functools.partial(Counter), "is the class Counter"),
        ("org/reward-model", r"functions is str.*a reward model is RewardModel\('org/reward-model'\)"),
        (None, "functions is NoneType"),
        ([None], "expected a callable"),
    ],
    ids=[
        "model",
        "partial model",
        "model in a list",
        "class",
        "partial class",
        "name",
        "None",
        "[None]",
    ],
)
def test_what_is_no_function_is_refused_with_what_to_do(function, words):
    with pytest.raises(TypeError, match=words):
        RewardRunner(function, timeout=None)


# What functions return


@pytest.mark.parametrize(
    "returned",
    [
        [Decimal("1"), Decimal("0.0"), Decimal("2e0")],
        [Fraction(1), Fraction(0), Fraction(4, 2)],
        [True, False, 2],
        [np.bool_(True), np.float16(0), np.longdouble(2)],
        [torch.tensor(1, dtype=torch.bfloat16), torch.tensor(False), np.array(2)],
        torch.tensor([1.0, 0.0, 2.0], requires_grad=True),
        torch.tensor([1, 0, 2], dtype=torch.bfloat16),
        torch.tensor([1.0, 9, 0, 9, 2])[::2],
        np.array([1, 0, 2], dtype=object),
        np.array([1.0, 9, 0, 9, 2])[::2],
        np.array([1, 0, 2], dtype=">f8"),
        range(3),
        {"a": 1.0, "b": 0.0, "c": 2.0}.values(),
        map(float, [1, 0, 2]),
    ],
    ids=lambda value: f"{type(value).__name__} {getattr(value, 'dtype', '')}",
)
def test_numbers_of_every_kind(make, timeout, returned):
    result = score(make(lambda completions: returned, timeout if not isinstance(returned, map) else 20.0, retries=0))
    assert result.errors == [] and result.scores == ([0, 1, 2] if isinstance(returned, range) else [1, 0, 2])


def endless():
    while True:
        yield 1.0


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ({1.0, 2.0, 3.0}, ["set {1.0, 2.0, 3.0}", "expected a list"]),
        (frozenset([1.0, 2.0, 3.0]), ["frozenset"]),
        ({0: 1, 1: 1, 2: 1}.keys(), ["dict_keys"]),
        ({"scores": [1.0, 2.0, 3.0]}, ["dict"]),
        ("123", ["str '123'"]),
        (b"123", ["bytes"]),
        (bytearray(b"123"), ["bytearray"]),
        (memoryview(b"123"), ["memoryview"]),
        ([[1.0], [2.0], [3.0]], ["list [1.0] for completion 0"]),
        ([1.0, [2.0], 3.0], ["list [2.0] for completion 1"]),
        ([1.0, Unprintable(), 3.0], ["Unprintable", "for completion 1"]),
        ([1.0, "x" * 10_000, 3.0], ["for completion 1", "..."]),
        (Unprintable(), ["Unprintable", "expected a list"]),
        (np.zeros((3, 3)), ["ndarray of shape (3, 3), expected (3,)"]),
        (np.array(["1", "2", "3"]), ["str '1' for completion 0"]),
        (torch.zeros(3, dtype=torch.complex64), ["complex"]),
        (torch.zeros(3, device="meta"), ["meta"]),
        (Decimal("1"), ["Decimal", "expected a list"]),
        (endless(), ["returned more scores, expected 3"]),
        ([], ["returned 0 scores, expected 3"]),
        (length, ["function", "expected a list"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_list_of_numbers_is_invalid_and_shown_briefly(make, returned, words):
    result = score(make(lambda completions: returned, None, retries=0))
    assert_all_invalid(result, *words)
    assert len(result.errors[0]) < 1000


@pytest.mark.parametrize("value", [1e300, -1e300, 3e38, 3.5e38, 2 * LARGEST_SCORE, 10**30])
def test_a_score_that_fp32_cannot_square_is_invalid_and_said_to_be(make, value):
    result = score(make(lambda completions: [value, 1.0, 2.0], None))
    assert math.isnan(result.scores[0]) and result.scores[1:] == [1, 2] and result.failures == 1
    assert "more than 1e+12 in size" in result.errors[0] and "for 1 of 3 completions" in result.errors[0]


def test_a_sum_that_is_too_large_is_said_to_be_the_sum(make):
    runner = make([lambda completions: [LARGEST_SCORE, 1.0, -LARGEST_SCORE]] * 2, None)
    result = score(runner)
    assert result.failures == 2 and result.scores[1] == 2 and result.by_name["<lambda>"][0] == LARGEST_SCORE
    assert "the rewards' sum is more than 1e+12" in result.errors[0] and "2 of 3" in result.errors[0]


# Nothing a function does reaches another one, a retry, or the data


def empties(prompts, completions, answer, completion_ids):
    for values in (prompts, completions, answer, completion_ids):
        for value in values:
            if isinstance(value, list):
                value.clear()
        values.clear()
    raise RuntimeError("and a retry sees the same")


def test_functions_get_lists_of_their_own(make, timeout):
    seen = []

    def looks(prompts, completions, answer, completion_ids):
        seen.append((prompts, completions, answer, completion_ids))
        return [len(answer[0]) + len(prompts[0]) + len(completion_ids[0]) + len(completions)] * 3

    shared = [1, 2]
    prompts = [[{"role": "user", "content": "a"}]] * 3
    columns, ids = {"answer": [shared] * 3}, [[5]] * 3
    result = make([empties, looks, empties], timeout, retries=1)(prompts, TEXTS, columns, completion_ids=ids)
    assert result.by_name["looks"] == [7, 7, 7]
    assert all("and a retry sees the same" in error for error in result.errors) and len(result.errors) == 4
    assert shared == [1, 2] and columns == {"answer": [[1, 2]] * 3} and ids == [[5]] * 3
    assert prompts == [[{"role": "user", "content": "a"}]] * 3


def test_samples_of_one_row_get_values_of_their_own(make, timeout):
    """The trainer gives each sample of a prompt the same row."""

    def takes_the_last(completions, answer):
        return [values.pop() for values in answer]

    row = [1, 2, 3]
    runner = make(takes_the_last, timeout, retries=0)
    assert [score(runner, answer=[row] * 3).scores for _ in range(2)] == [[3, 3, 3]] * 2 and row == [1, 2, 3]


def test_a_value_that_cannot_be_copied_is_passed_as_it_is(make):
    lock = threading.Lock()
    assert score(make(lambda completions, lock: [lock[0].acquire()] * 3, None), lock=[lock] * 3).scores == [1, 1, 1]


# How functions fail


class Textless(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class NoText(Exception):
    def __str__(self):
        return 3


class Unpicklable(Exception):
    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


class Odd(BaseException):
    pass


def recurses(completions):
    return recurses(completions)


def raiser(error):
    def reward(completions):
        raise error

    return reward


def warns(completions):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.warn("old grader", stacklevel=1)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (raiser(Textless()), ["Textless: its text cannot be had"]),
        (raiser(NoText()), ["NoText: its text cannot be had"]),
        (raiser(Unpicklable("out of cheese")), ["Unpicklable: out of cheese"]),
        (raiser(SystemExit(3)), ["SystemExit: 3"]),
        (raiser(GeneratorExit("left")), ["GeneratorExit: left"]),
        (raiser(Odd("odd")), ["Odd: odd"]),
        (raiser(RuntimeError("x" * 100_000)), ["RuntimeError: xxx", "..."]),
        (raiser(RuntimeError("\udc80\x1b[2J")), ["RuntimeError: \udc80\x1b[2J"]),
        (raiser(StopIteration(1)), ["StopIteration: 1"]),
        (recurses, ["RecursionError"]),
        (warns, ["UserWarning: old grader"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_no_exception_escapes(make, timeout, function, words):
    result = score(make([function, length], timeout, retries=0))
    assert_all_invalid(result, *words)
    assert result.by_name["length"] == [3, 5, 5] and len(result.errors[0]) < 4000


def test_a_keyboard_interrupt_of_its_own_is_a_failure_in_its_process_and_ctrl_c_in_the_trainers(make):
    assert_all_invalid(score(make(raiser(KeyboardInterrupt("own")), 20.0, retries=0)), "KeyboardInterrupt: own")
    with pytest.raises(KeyboardInterrupt):
        score(make(raiser(KeyboardInterrupt("Ctrl-C")), None, retries=0))


# What functions do to their process stays there


def changes_everything(completions):
    os.chdir("/")
    os.environ["FASTPPO_TEST_REWARD"] = "set"
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    warnings.simplefilter("error")
    sys.setrecursionlimit(5000)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.stdout = None
    return [1.0] * len(completions)


def state_of_this_process():
    return (
        os.getcwd(),
        os.environ.get("FASTPPO_TEST_REWARD"),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        list(warnings.filters),
        sys.getrecursionlimit(),
        signal.getsignal(signal.SIGTERM),
        sys.stdout,
    )


def test_changes_of_its_process_stay_there(make):
    before = state_of_this_process()
    runner = make(changes_everything, 20.0, retries=0)
    assert [score(runner).scores for _ in range(2)] == [[1, 1, 1]] * 2
    assert state_of_this_process() == before


def test_what_is_printed_comes_out_once_however_much(make, capfd):
    def prints(completions):
        sys.stdout.write("line of a grader\n" * 20_000)
        print("to stderr", file=sys.stderr)
        return [1.0] * len(completions)

    assert score(make(prints, 20.0)).scores == [1, 1, 1]
    out, err = capfd.readouterr()
    assert out.count("line of a grader\n") == 20_000 and err.count("to stderr") == 1


def test_an_alarm_that_was_left_behind_costs_no_score(make):
    def sets_an_alarm(completions):
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        return [os.getpid()] * len(completions)

    runner = make(sets_an_alarm, 20.0)
    first = int(score(runner).scores[0])
    eventually(lambda: is_gone(first) or ") Z " in open(f"/proc/{first}/stat").read())
    assert score(runner).failures == 0


def test_what_it_left_running_ends_with_the_runner(make):
    def leaves(completions):
        return [subprocess.Popen(["sleep", "1000"], start_new_session=new).pid for new in (False, True, True)]

    runner = make(leaves, 20.0)
    pids = [int(pid) for pid in score(runner).scores]
    time.sleep(0.05)
    assert not any(map(is_gone, pids)), "a server that it started serves the next call"
    runner.close()
    eventually(lambda: all(map(is_gone, pids)))


# Columns


def test_columns_are_checked_before_the_first_call(make):
    runner = make([length, lambda completions, answr: []], None)
    with pytest.raises(ValueError, match="asks for 'answr'.*did you mean 'answer'"):
        runner.check_columns(["answer"])
    make(length, None).check_columns(iter(["answer"]))
    assert make(length, None)(PROMPTS, TEXTS, {}).failures == 0
