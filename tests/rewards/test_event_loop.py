"""Async rewards: one event loop for the life of the process, so that what a reward made once works at every step."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars

import pytest

from fastppo.rewards import event_loop
from tests.rewards.conftest import TEXTS, assert_all_invalid, score


@pytest.fixture(params=[20.0, None], ids=["forked", "in-process"])
def timeout(request):
    return request.param


class Client:
    """A connection that is kept open, as an HTTP client keeps its own: it belongs to the loop that it was opened in."""

    def __init__(self):
        self.streams = None

    async def ask(self, text):
        if self.streams is None:
            server = await asyncio.start_server(self.echo, "127.0.0.1", 0)
            self.streams = await asyncio.open_connection(*server.sockets[0].getsockname())
        reader, writer = self.streams
        writer.write(text.encode() + b"\n")
        return len((await reader.readline()).strip())

    async def echo(self, reader, writer):
        with contextlib.suppress(asyncio.CancelledError):
            while line := await reader.readline():
                writer.write(line)


def with_semaphore():
    semaphore = asyncio.Semaphore(1)  # bound to a loop when it first makes someone wait

    async def one(text):
        async with semaphore:
            await asyncio.sleep(0)
            return len(text)

    return one


def with_lock():
    lock = asyncio.Lock()

    async def one(text):
        async with lock:
            await asyncio.sleep(0)
            return len(text)

    return one


def with_client():
    client, lock = Client(), asyncio.Lock()

    async def one(text):
        async with lock:
            return await client.ask(text)

    return one


def with_worker_task():
    """A task of the first step that serves the later ones through a queue."""
    queue, tasks = asyncio.Queue(), []

    async def work():
        while True:
            text, answer = await queue.get()
            answer.set_result(len(text))

    async def one(text):
        if not tasks:
            tasks.append(asyncio.create_task(work()))
        answer = asyncio.get_running_loop().create_future()
        queue.put_nowait((text, answer))
        return await answer

    return one


@pytest.mark.parametrize("make_one", [with_semaphore, with_lock, with_client, with_worker_task])
def test_what_was_made_once_works_at_every_step(make, timeout, make_one):
    one = make_one()

    async def lengths(completions):
        return await asyncio.gather(*map(one, completions))

    runner = make(lengths, timeout, retries=0)
    results = [score(runner) for _ in range(3)]
    assert [result.errors for result in results] == [[], [], []]
    assert [result.scores for result in results] == [[3, 5, 5]] * 3


def test_two_rewards_share_the_loop_of_the_trainers_process(make):
    semaphore = asyncio.Semaphore(1)

    async def one(text):
        async with semaphore:
            await asyncio.sleep(0)
            return len(text)

    async def first(completions):
        return await asyncio.gather(*map(one, completions))

    async def second(completions):
        return await asyncio.gather(*map(one, completions))

    assert score(make([first, second], None)).scores == [6, 10, 10]
    assert score(make([first, second], None)).scores == [6, 10, 10], "and so does the next runner"


def test_a_notebook_whose_loop_is_busy_uses_the_same_loop(make):
    one = with_semaphore()

    async def lengths(completions):
        return await asyncio.gather(*map(one, completions))

    runner = make(lengths, None, retries=0)

    async def cell():
        return score(runner)

    assert [score(runner).scores, asyncio.run(cell()).scores, asyncio.run(cell()).scores] == [[3, 5, 5]] * 3


def test_an_async_failure_leaves_the_loop_usable(make, timeout):
    async def fails(completions, how):
        await asyncio.sleep(0)
        if how[0]:
            raise how[0]
        return [1.0] * len(completions)

    runner = make(fails, timeout, retries=0)
    for how in (RuntimeError("no cheese"), asyncio.CancelledError("no cheese"), SystemExit("no cheese")):
        assert_all_invalid(score(runner, how=[how] * 3), type(how).__name__, "no cheese")
        assert score(runner, how=[None] * 3).scores == [1, 1, 1]


def test_the_errors_within_a_group_are_told(make, timeout):
    async def one(text):
        raise RuntimeError(f"no cheese for {text}")

    async def grouped(completions):
        errors = await asyncio.gather(*map(one, completions), return_exceptions=True)
        raise _Group("3 sub-exceptions", errors)

    assert_all_invalid(score(make(grouped, timeout, retries=0)), "3 sub-exceptions", *TEXTS)


class _Group(Exception):
    """As ExceptionGroup, which Python 3.10 lacks."""

    def __init__(self, text, exceptions):
        super().__init__(text)
        self.exceptions = exceptions


def test_a_reward_inside_an_async_reward_is_refused_instead_of_waiting_for_itself(make):
    async def inner(completions):
        return [1.0] * len(completions)

    runner = make(inner, None, retries=0)

    async def outer(completions):
        return ["inside its own event loop" in runner(["p"], ["c"], {}).errors[0]] * len(completions)

    with pytest.warns(RuntimeWarning, match="never awaited"):
        assert score(make(outer, None, retries=0)).scores == [1, 1, 1]


@pytest.mark.parametrize("deaf", [False, True], ids=["task", "task that ignores its cancellation"])
def test_the_end_of_the_interpreter_ends_a_task_that_was_left_behind(monkeypatch, deaf):
    monkeypatch.setattr(event_loop, "CANCEL_SECONDS", 0.1)
    loop, ended = asyncio.new_event_loop(), []

    async def left_behind():
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            ended.append(True)
            if deaf:
                await asyncio.sleep(1000)

    async def starts_one():
        task = asyncio.create_task(left_behind())
        await asyncio.sleep(0)
        return task

    loop.run_until_complete(starts_one())
    event_loop._close(loop)
    assert ended and loop.is_closed()


def test_context_variables_of_the_caller_are_seen_in_process(make):
    language = contextvars.ContextVar("language", default=0)

    async def reads(completions):
        return [language.get()] * len(completions)

    language.set(3)
    assert score(make(reads, None)).scores == [3, 3, 3]
