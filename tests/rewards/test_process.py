"""Reward functions that hang, die, start processes or lose their trainer: nothing hangs, nothing stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from fastppo.rewards import RewardRunner, process
from tests.rewards.conftest import PATIENCE, assert_all_invalid, eventually, is_gone, length, score

# Time limits and deaths


def test_a_function_that_never_returns_is_killed_and_the_next_call_works(make):
    def sleepy(completions, level):
        time.sleep(level[0])
        return [1.0] * len(completions)

    runner = make(sleepy, 0.5, retries=0)
    started = time.monotonic()
    assert_all_invalid(score(runner, level=[1000] * 3), "no answer within 0.5 s")
    assert time.monotonic() - started < PATIENCE
    assert score(runner, level=[0] * 3).scores == [1, 1, 1]


def test_a_loop_that_ignores_signals_is_killed(make):
    def stubborn(completions):
        for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        while True:
            pass

    assert_all_invalid(score(make(stubborn, 0.3, retries=1)), "attempt 2 of 2", "no answer within 0.3 s")


def test_time_limits_work_from_any_thread(make):
    """verl#5635: limits built on signals work in the main thread only and score every answer 0 elsewhere."""
    results = []

    def sleepy(completions):
        time.sleep(1000)

    def work():
        results.append(score(make([length], 20.0)))
        results.append(score(make(sleepy, 0.3, retries=0)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results[0].scores == [3, 5, 5]
    assert_all_invalid(results[1], "no answer within 0.3 s")


def test_the_process_outlives_the_thread_that_forked_it(make):
    runners = []
    thread = threading.Thread(target=lambda: runners.append(make(lambda completions: [os.getpid()] * 3, 20.0)))
    thread.start()
    thread.join()
    first = score(runners[0]).scores
    time.sleep(0.1)
    assert score(runners[0]).scores == first


def test_signal_based_limits_work_inside_a_function(make):
    """It runs on its process's main thread, even where the runner was made in another thread."""

    def alarmed(completions):
        signal.signal(signal.SIGALRM, lambda *_: None)
        return [threading.current_thread() is threading.main_thread()] * len(completions)

    results = []
    thread = threading.Thread(target=lambda: results.append(score(make(alarmed, 20.0))))
    thread.start()
    thread.join()
    assert results[0].scores == [1, 1, 1]


@pytest.mark.parametrize(
    ("die", "words"),
    [
        (lambda: os._exit(7), "exited with status 7"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by signal 9"),
        (lambda: os.kill(os.getpid(), signal.SIGRTMIN + 1), f"killed by signal {signal.SIGRTMIN + 1}"),
    ],
    ids=["exit", "kill", "real-time signal"],
)
def test_a_process_that_dies_is_replaced(make, die, words):
    def fatal(completions, level):
        if level[0]:
            die()
        return [1.0] * len(completions)

    runner = make(fatal, 20.0, retries=0)
    assert_all_invalid(score(runner, level=[1, 1, 1]), words)
    assert score(runner, level=[0, 0, 0]).scores == [1, 1, 1]


def test_a_process_killed_between_calls_costs_nothing(make):
    runner = make(lambda completions: [os.getpid()] * 3, 20.0, retries=0)
    first = int(score(runner).scores[0])
    os.kill(first, signal.SIGKILL)
    eventually(lambda: is_gone(first) or ") Z " in Path(f"/proc/{first}/stat").read_text())
    second = score(runner)
    assert second.failures == 0 and second.scores[0] != first


def test_a_process_that_stopped_reading_is_given_up(make, monkeypatch):
    """Even the watching process is stuck then: it writes to a process that is stopped."""
    monkeypatch.setattr(process, "GRACE", 0.5)
    runner = make(lambda completions, pad: [os.getpid()] * 3, 0.5, retries=0)
    pid = int(score(runner, pad=[""] * 3).scores[0])
    os.kill(pid, signal.SIGSTOP)
    assert_all_invalid(score(runner, pad=["x" * 1_000_000] * 3), "does not answer")
    eventually(lambda: is_gone(pid))
    assert score(runner, pad=[""] * 3).failures == 0


def test_state_is_kept_between_calls(make):
    calls = []

    def counts(completions):
        calls.append(1)
        return [len(calls)] * len(completions)

    runner = make(counts, 20.0)
    assert [score(runner).scores[0] for _ in range(3)] == [1, 2, 3]


def test_functions_work_at_the_same_time(make):
    def waits(completions):
        time.sleep(1)
        return [1.0] * len(completions)

    runner = make([waits] * 4, 20.0)
    started = time.monotonic()
    assert score(runner).scores == [4, 4, 4]
    assert time.monotonic() - started < 3


def test_torch_works_in_the_process(make):
    """A parallel region in a fork waits for threads that are not there, unless one thread is set first."""
    torch.ones(300, 300) @ torch.ones(300, 300)

    def multiplies(completions):
        return [(torch.ones(300, 300) @ torch.ones(300, 300))[0, 0] + torch.get_num_threads()] * len(completions)

    assert score(make(multiplies, 20.0)).scores == [301, 301, 301]


def test_a_reply_that_is_not_json_is_refused(make):
    """A process that ran model-written code may send anything: it is parsed, never unpickled."""

    def forges(completions):
        for fd in (int(name) for name in os.listdir("/proc/self/fd")):
            if os.path.exists(f"/proc/self/fd/{fd}") and stat.S_ISSOCK(os.fstat(fd).st_mode):
                with contextlib.suppress(OSError):  # one whose other end is closed
                    os.write(fd, (6).to_bytes(4, "big") + b"cos\nsy")
        return [1.0] * 3

    assert_all_invalid(score(make(forges, 2.0, retries=0)), "other than JSON")


# Processes


@pytest.mark.parametrize("new_session", [False, True], ids=["in its group", "in a session of its own"])
def test_what_a_killed_function_started_dies_too(make, tmp_path, new_session):
    def spawns(completions):
        child = subprocess.Popen(["sleep", "1000"], start_new_session=new_session)
        (tmp_path / "pid").write_text(str(child.pid))
        time.sleep(1000)

    assert_all_invalid(score(make(spawns, 1.0, retries=0)), "no answer")
    eventually(lambda: is_gone(int((tmp_path / "pid").read_text())))


def test_a_fork_that_returns_from_the_function_answers_only_once(make):
    def forks(completions):
        os.fork()
        return [1.0] * len(completions)

    runner = make(forks, 20.0)
    assert [score(runner).scores for _ in range(3)] == [[1, 1, 1]] * 3


def test_close_ends_all_processes_and_the_next_call_starts_them_again(make):
    runner = make(lambda completions: [os.getpid(), os.getppid(), 0], 20.0)
    pids = [int(value) for value in score(runner).scores[:2]]
    runner.close()
    runner.close()
    assert all(map(is_gone, pids))
    assert score(runner).failures == 0


def test_a_forgotten_runner_ends_its_processes():
    runner = RewardRunner(lambda completions: [os.getpid(), os.getppid(), 0], timeout=20.0)
    pids = [int(value) for value in score(runner).scores[:2]]
    del runner
    eventually(lambda: all(map(is_gone, pids)))


def test_a_killed_trainer_takes_all_processes_along(tmp_path):
    script = f"""
        import os, subprocess, time
        from fastppo.rewards import RewardRunner

        def endless(completions):
            child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
            text = f"{{os.getppid()}} {{os.getpid()}} {{child.pid}}"
            open("{tmp_path}/part", "w").write(text)
            os.rename("{tmp_path}/part", "{tmp_path}/pids")
            time.sleep(1000)

        runner = RewardRunner([endless, lambda completions: [0.0]], timeout=500)
        runner(["p"], ["c"], {{}})
    """
    trainer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    try:
        while not (tmp_path / "pids").exists() and trainer.poll() is None:
            time.sleep(0.05)
    finally:
        trainer.kill()
        trainer.wait()
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    eventually(lambda: all(map(is_gone, pids)))


@pytest.fixture
def ctrl_c_interrupts():
    """Also where the tests were started in the background, with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_the_call_and_leaves_no_stale_answer(make, ctrl_c_interrupts):
    def echo(completions, level):
        time.sleep(level[0])
        return level

    runner = make(echo, 100.0)
    assert score(runner, level=[0, 1, 2]).scores == [0, 1, 2]
    alarm = threading.Timer(0.3, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT))
    alarm.start()
    with pytest.raises(KeyboardInterrupt):
        score(runner, level=[50, 0, 0])
    assert score(runner, level=[0, 3, 4]).scores == [0, 3, 4]


def test_a_runner_works_in_a_fork_of_its_owner(make):
    runner = make(length, 20.0)
    score(runner)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if score(runner).scores == [3, 5, 5] else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert score(runner).scores == [3, 5, 5]


def test_without_fork_it_calls_in_process_and_says_so_once(make, monkeypatch):
    monkeypatch.setattr(process, "supported", lambda: False)
    with pytest.warns(UserWarning, match="cannot fork"):
        runner = make(lambda completions: [os.getpid()] * 3, 20.0)
    assert score(runner).scores[0] == os.getpid()
