"""Thread and process pools in rewards, made before the reward's process was forked or in it, idle or in use: none of them hangs."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.pool
import os
import sys
import textwrap
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest

from tests import fresh
from tests.rewards.conftest import assert_all_invalid, eventually, is_gone, score

FORK, SPAWN, SERVER = map(multiprocessing.get_context, ("fork", "spawn", "forkserver"))
POOLS = {
    "thread executor": lambda: ThreadPoolExecutor(2),
    "process executor": lambda: ProcessPoolExecutor(2, mp_context=FORK),
    "process executor with an initializer": lambda: ProcessPoolExecutor(
        2, mp_context=FORK, initializer=os.putenv, initargs=("A", "b")
    ),
    "spawned process executor": lambda: ProcessPoolExecutor(1, mp_context=SPAWN),
    "thread pool": lambda: multiprocessing.pool.ThreadPool(2),
    "process pool": lambda: FORK.Pool(2),
    "spawned process pool": lambda: SPAWN.Pool(1),
    "process executor of a fork server": lambda: ProcessPoolExecutor(1, mp_context=SERVER),
    "process pool of a fork server": lambda: SERVER.Pool(1),
}


@pytest.fixture(scope="module", autouse=True)
def bare_servers():
    """The fork server of a reward's process imports nothing: with what tests/fresh.py has imported by that of this process it takes ten seconds."""
    multiprocessing.forkserver.ensure_running()
    SERVER.set_forkserver_preload(["__main__"])
    yield
    SERVER.set_forkserver_preload(fresh.IMPORTED)


@pytest.fixture
def closing():
    pools = []
    yield pools
    for pool in pools:
        pool.shutdown() if hasattr(pool, "shutdown") else (pool.terminate(), pool.join())


# Idle and closed pools are restarted alike whatever starts their processes; to spawn one takes a second.
FORKED = [kind for kind in POOLS if "spawned" not in kind]


def lengths(pool, texts):
    return list(pool.map(len, texts))


def _nap(number):
    time.sleep(0.02)
    return number


@pytest.mark.parametrize(("kind", "used"), [(kind, True) for kind in POOLS] + [(kind, False) for kind in FORKED])
def test_a_pool_made_before_the_fork(make, closing, kind, used):
    """The reward file's `pool = ThreadPoolExecutor(8)`, which whoever tried the reward has used already."""
    pool = POOLS[kind]()
    closing.append(pool)
    if used:  # by so many that every thread has begun
        assert list(pool.map(_nap, range(6))) == list(range(6))

    def reward(completions):
        return lengths(pool, completions)

    runner = make(reward, 60.0, retries=0)
    assert [score(runner).errors for _ in range(2)] == [[], []]
    assert score(runner).scores == [3, 5, 5]
    assert lengths(pool, ["abc"]) == [3], "the original works on"


@pytest.mark.parametrize("kind", POOLS)
def test_a_pool_made_in_the_rewards_process(make, kind):
    pools = []

    def reward(completions):
        if not pools:
            pools.append(POOLS[kind]())
        return lengths(pools[0], completions)

    runner = make(reward, 60.0, retries=0)
    assert [score(runner).scores for _ in range(2)] == [[3, 5, 5]] * 2


def test_the_processes_of_a_pool_end_with_the_reward(make):
    pools = []

    def pids(completions):
        pools[:] = pools or [FORK.Pool(3)]
        return [process.pid for process in pools[0]._pool]

    runner = make(pids, 60.0)
    found = [int(pid) for pid in score(runner).scores]
    runner.close()
    eventually(lambda: all(map(is_gone, found)))


def test_each_process_has_a_pool_of_its_own_after_a_kill(make, closing):
    """Work that a killed process left in the queue of a pool is not answered in the place of the next one's."""
    pool = ProcessPoolExecutor(1, mp_context=FORK)
    closing.append(pool)

    def reward(completions, wait):
        return list(pool.map(time.sleep, wait)) if wait[0] else lengths(pool, completions)

    runner = make(reward, 2.0, retries=0)
    assert_all_invalid(score(runner, wait=[100] * 3), "no answer within 2 s")
    assert score(runner, wait=[0] * 3).scores == [3, 5, 5]


@pytest.mark.parametrize("kind", FORKED)
def test_a_closed_pool_stays_closed(make, kind):
    pool = POOLS[kind]()
    lengths(pool, ["a"])
    pool.shutdown() if hasattr(pool, "shutdown") else (pool.close(), pool.join())

    def reward(completions):
        return lengths(pool, completions)

    assert_all_invalid(score(make(reward, 60.0, retries=0)), "Error")


class Odd(ThreadPoolExecutor):
    def __init__(self):
        """Not as its base is made."""

    _threads = property(lambda self: ())


def test_a_pool_of_another_make_is_left_alone(make):
    odd, thread = Odd(), threading.Thread(target=threading.Event().wait, args=(1,))
    thread.start()  # so that pools are looked for
    assert score(make(lambda completions: [len(odd._threads)] * 3, 60.0)).scores == [0, 0, 0]
    thread.join()


def test_a_pool_in_a_reward_file_that_another_module_imports(make, closing, tmp_path, monkeypatch):
    """It is found wherever it stands: the function's own globals may not name it."""
    (tmp_path / "pool_helper_of_a_reward.py").write_text(
        textwrap.dedent("""
            from concurrent.futures import ThreadPoolExecutor
            pool = ThreadPoolExecutor(1)
            lengths = lambda texts: list(pool.map(len, texts))
        """)
    )
    monkeypatch.syspath_prepend(tmp_path)
    import pool_helper_of_a_reward as helper

    closing.append(helper.pool)
    monkeypatch.delitem(sys.modules, "pool_helper_of_a_reward")
    helper.lengths(["a"])

    def reward(completions, grade=helper.lengths):
        return grade(completions)

    assert score(make(reward, 60.0, retries=0)).scores == [3, 5, 5]
