"""A reward that takes too long says where it was, in every thread and task, and what can be done."""

from __future__ import annotations

import asyncio
import re
import signal
import threading
import time

import pytest

from fastppo.rewards import stacks
from tests.rewards.conftest import assert_all_invalid, score


def stops_here(*_):
    time.sleep(1000)


def in_a_call(completions):
    stops_here()


def in_a_thread(completions):
    thread = threading.Thread(target=stops_here)
    thread.start()
    thread.join()


def with_every_signal_ignored_but_ours(completions):
    for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    stops_here()


def in_c_code_that_holds_the_interpreter(completions):
    deep_pattern = re.compile(r"(a+)+b")
    deep_pattern.match("a" * 64)


def while_it_formats_an_error(completions):
    try:
        raise RuntimeError
    except RuntimeError:
        stops_here()


class Stateful:
    def __call__(self, completions):
        stops_here()


async def in_an_await(completions):
    await asyncio.sleep(1000)


async def in_a_task(completions):
    async def stuck():
        await asyncio.Event().wait()

    await asyncio.gather(*(stuck() for _ in completions))


async def in_a_call_of_a_coroutine(completions):
    stops_here()


@pytest.mark.parametrize(
    ("function", "places"),
    [
        (in_a_call, ["in stops_here", "in in_a_call"]),
        (in_a_thread, ["Main thread", "in in_a_thread", "in stops_here"]),
        (with_every_signal_ignored_but_ours, ["in stops_here"]),
        (in_c_code_that_holds_the_interpreter, ["in in_c_code_that_holds_the_interpreter"]),
        (while_it_formats_an_error, ["in stops_here"]),
        (Stateful(), ["in stops_here", "in __call__"]),
        (in_an_await, ["Task", "in sleep", "in in_an_await"]),
        (in_a_task, ["Task", "in in_a_task", "in stuck"]),
        (in_a_call_of_a_coroutine, ["in stops_here", "in in_a_call_of_a_coroutine"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_it_says_where(make, function, places):
    result = score(make(function, 0.5, retries=0))
    assert_all_invalid(
        result, "no answer within 0.5 s", *places, __file__, "raise reward.timeout", "reward.timeout=None"
    )
    (error,) = result.errors
    for plumbing in ("keeper.py", "runner.py", "function.py"):
        assert plumbing not in error, "only the function's own calls are of interest"


def test_a_function_that_blocks_the_signal_is_killed_without_a_stack(make):
    def deaf(completions):
        signal.pthread_sigmask(signal.SIG_BLOCK, [stacks.STACK_SIGNAL])
        stops_here()

    result = score(make(deaf, 0.3, retries=0))
    assert_all_invalid(result, "no answer within 0.3 s", "raise reward.timeout")
    assert "stops_here" not in result.errors[0]


def test_a_function_that_floods_the_pipe_is_killed_all_the_same(make, monkeypatch):
    monkeypatch.setattr(stacks.event_loop, "waiting_tasks", lambda: "  File\n" * 1_000_000)
    assert_all_invalid(score(make(in_an_await, 0.3, retries=0)), "no answer within 0.3 s")


def test_deep_and_wide_stacks_are_cut(make):
    def deep(level):
        deep(level - 1) if level else stops_here()

    def wide(completions):
        for _ in range(80):  # faulthandler stops after a hundred
            threading.Thread(target=deep, args=(50,), daemon=True).start()
        deep(500)

    (error,) = score(make(wide, 1.0, retries=0)).errors
    main_thread = error.partition("Main thread")[2].partition("\n  Thread")[0]
    assert "in stops_here" in main_thread and main_thread.count("in deep") == stacks.SHOWN_FRAMES - 1
    assert len(error) < stacks.SHOWN_CHARACTERS + 1000


def test_threads_that_did_not_come_along_are_named(make):
    """A client or a logger with a thread of its own, started before the trainer: the copy waits for it for ever."""
    questions, answered, done = threading.Event(), threading.Event(), threading.Event()

    def serve():
        while not done.is_set():
            if questions.wait(0.01):
                answered.set()

    server = threading.Thread(target=serve, name="grader client")
    server.start()
    try:

        def asks(completions):
            questions.set()
            answered.wait()
            return [1.0] * len(completions)

        result = score(make(asks, 0.5, retries=0))
    finally:
        done.set()
        server.join()
    assert_all_invalid(result, "in asks", "other threads (", "'grader client'", "at its first call")


def test_without_other_threads_none_are_spoken_of(make):
    if threading.active_count() == 1:
        assert "other threads" not in score(make(in_a_call, 0.3, retries=0)).errors[0]
