"""Episodes are what a session would say by hand, whatever some environments do meanwhile."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import subprocess
import threading
import time

import psutil
import pytest
import torch

from fastppo.environment_config import EnvironmentConfig
from fastppo.envs import EpisodePlayer, Played
from fastppo.rollout import Engine, FinishReason, SamplingParams
from tests.envs.worlds import ROWS, SAMPLING, TURNS, Talk, make_engine, play, rows_of, threads, watch_pages
from tests.tiny import LETTERS, make_tokenizer

EPISODES = len(ROWS) * SAMPLING.n


@pytest.fixture(autouse=True)
def nothing_leaks(monkeypatch):
    """Every page is free when a session is over, and every thread ends."""
    watch_pages(monkeypatch)
    yield
    deadline = time.monotonic() + 10
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads()


@pytest.fixture(scope="module")
def engine():
    return make_engine()


@pytest.fixture(scope="module")
def talked(engine) -> Played:
    return play(Talk, engine)


def assert_same(found: Played, expected: Played, but: int | None = None) -> None:
    """To the last bit, all episodes or all but one."""
    kept = [i for i in range(EPISODES) if i != but]
    one, other = found.rollout.select(kept), expected.rollout.select(kept)
    for name in ("tokens", "cu_seqlens", "action_mask", "logprobs", "finish_reasons", "prompt_index"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert [found.episodes[i].turns for i in kept] == [expected.episodes[i].turns for i in kept]


def test_an_episode_is_what_a_session_says_by_hand(engine, talked):
    """Token ids are carried from turn to turn, and what the environment said is no action."""
    rollout, rows = talked.rollout, rows_of(engine.tokenizer)
    for number, episode in enumerate(talked.episodes):
        world, row = Talk(), rows[episode.prompt]
        given = engine.tokenizer(world.reset(row, episode.seed))["input_ids"]
        expected, mask = list(given), [False] * len(given)
        with engine.open(SamplingParams(max_new_tokens=5, seed=3)) as session:
            session.add(given, streams=[number])
            for turn in session:
                observation, reward, over, _, _ = world.step(
                    engine.tokenizer.decode(turn.tokens, skip_special_tokens=True)
                )
                reply = engine.tokenizer(observation)["input_ids"]
                expected += turn.tokens + ([] if over else reply)
                mask += [True] * len(turn.tokens) + [False] * (0 if over else len(reply))
                session.close(turn.id) if over else session.append(turn.id, reply)
        begin, end = rollout.bounds[number : number + 2]
        assert rollout.tokens[begin:end].tolist() == expected
        assert rollout.action_mask[begin:end].tolist() == mask
    assert rollout.prompt_index.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert set(rollout.finish_reasons.tolist()) == {FinishReason.STOP}


def test_samples_of_a_prompt_have_the_seed_and_other_prompts_another(talked):
    seeds = [episode.seed for episode in talked.episodes]
    assert seeds[::2] == seeds[1::2] and len(set(seeds)) == len(ROWS)


def test_each_turn_is_paid_at_its_last_action(talked):
    rewards, paid = talked.turn_rewards(), []
    for episode in talked.episodes:
        for turn in episode.turns:
            paid += [0.0] * (turn.tokens - 1) + [turn.reward]
            assert turn.reward == turn.completion.count("a") + 1
        assert episode.total_reward == sum(turn.reward for turn in episode.turns) and len(episode.turns) == TURNS
    assert rewards.tolist() == paid


class Slow(Talk):
    """Takes its time at random."""

    def step(self, completion):
        time.sleep(random.choice([0.0, 0.01, 0.05]))
        return super().step(completion)


class Async(Talk):
    async def reset(self, row, seed):
        await asyncio.sleep(0)
        return super().reset(row, seed)

    async def step(self, completion):
        await asyncio.sleep(0.002)
        return super().step(completion)


@pytest.mark.parametrize(
    ("factory", "config"),
    [(Slow, {}), (Slow, {"concurrent": 3}), (Talk, {"concurrent": 1}), (Async, {})],
    ids=["slow", "slow, three at once", "one at once", "async"],
)
def test_when_environments_answer_changes_nothing(engine, talked, factory, config):
    assert_same(play(factory, engine, **config), talked)


def test_an_environment_that_waits_holds_nobody_up(engine, talked):
    """The others' episodes are over before it answers."""
    others = []

    class Waits(Talk):
        def reset(self, row, seed):
            self.row = row
            return super().reset(row, seed)

        def step(self, completion):
            answer = super().step(completion)
            if self.row["level"] == 1 and len(self.said) == 1:
                until = time.monotonic() + 30
                while len(others) < EPISODES - 2 and time.monotonic() < until:
                    time.sleep(0.001)
                assert len(others) == EPISODES - 2
            elif len(self.said) == TURNS:
                others.append(self.row["prompt"])
            return answer

    assert_same(play(Waits, engine), talked)


class Gym(Talk):
    """With Gymnasium's signatures."""

    def reset(self, *, seed=None, options=None):
        return super().reset(options, seed), {"seed": seed}


def test_gymnasiums_environments(engine, talked):
    assert_same(play(Gym, engine), talked)
    gymnasium = pytest.importorskip("gymnasium")
    assert_same(play(type("Real", (Gym, gymnasium.Env), {}), engine), talked)


def test_environments_are_kept_for_the_next_episodes(engine, talked):
    made = []

    class Counted(Talk):
        def __init__(self):
            made.append(threading.get_ident())

        def close(self):
            assert threading.get_ident() in made
            made.append("closed")

    player = EpisodePlayer(Counted, engine, EnvironmentConfig(concurrent=3))
    for _ in range(2):
        assert_same(play(None, engine, player=player), talked)
    assert 1 <= len(made) <= 3
    player.close()
    assert made.count("closed") * 2 == len(made)


# Limits


def test_the_limit_on_turns_truncates(engine, talked):
    played = play(Talk, engine, max_turns=2)
    assert set(played.rollout.finish_reasons.tolist()) == {FinishReason.LENGTH}
    for number, (found, whole) in enumerate(zip(played.episodes, talked.episodes, strict=True)):
        assert found.turns == whole.turns[:2] and found.truncated
        end, last = played.rollout.bounds[number + 1], len(found.turns[1].observation)
        assert (
            played.rollout.tokens[end - last : end].tolist()
            == engine.tokenizer(found.turns[1].observation)["input_ids"]
        )
        assert not played.rollout.action_mask[end - last : end].any(), "the last observation is there for the critic"


def test_the_limit_on_tokens_truncates(engine, talked):
    played = play(Talk, engine, max_tokens=14)
    assert max(played.rollout.lengths) <= 14
    assert {len(episode.turns) for episode in played.episodes} > {1}
    for found, whole in zip(played.episodes, talked.episodes, strict=True):
        assert [turn.observation for turn in found.turns[:1]] == [turn.observation for turn in whole.turns[:1]]


def test_the_environments_own_truncation(engine):
    class Short(Talk):
        def step(self, completion):
            return *super().step(completion)[:2], False, True, {}

    assert all(e.truncated and len(e.turns) == 1 for e in play(Short, engine).episodes)


def test_an_observation_longer_than_the_context_truncates(engine):
    class Long(Talk):
        def step(self, completion):
            return "a" * 300, 1.0, False, False, {}

    played = play(Long, engine)
    assert all(e.truncated and len(e.turns) == 1 and e.total_reward == 1 for e in played.episodes)


# Faults: one of eight episodes fails, the others stay what they are to the last bit


def failing(act):
    """A `Talk` of which the second episode of the prompt "f" does what `act(environment, completion)` does in its second turn."""
    count = []

    class Failing(Talk):
        def reset(self, row, seed):
            self.fails = row["prompt"] == "f" and (count.append(1) or len(count) == 2)
            return super().reset(row, seed)

        def step(self, completion):
            answer = super().step(completion)
            return act(self, answer) if self.fails and len(self.said) == 2 else answer

    return Failing


def raises(environment, answer):
    raise KeyError("no such thing")


def leaves(environment, answer):
    raise SystemExit(3)


WRONG = {
    "raises": (raises, "KeyError: 'no such thing'"),
    "leaves": (leaves, "SystemExit: 3"),
    "four entries": (lambda e, answer: answer[:4], "step returned tuple"),
    "nothing": (lambda e, answer: None, "step returned NoneType None, expected .observation, reward"),
    "a flag that is a number": (lambda e, answer: (*answer[:2], 0, False, {}), "terminated of step is int 0"),
    "a reward that is a text": (lambda e, answer: ("", "1", True, False, {}), "reward of step is str '1'"),
    "NaN": (lambda e, answer: ("", float("nan"), True, False, {}), "reward of step is nan, expected a finite"),
    "an observation that is a number": (lambda e, answer: (5, *answer[1:]), "the observation of step is int 5"),
    "messages without a chat template": (
        lambda e, answer: ([{"role": "user", "content": "a"}], 0.0, False, False, {}),
        "messages, expected a text",
    ),
    "info that is none": (lambda e, answer: (*answer[:4], []), "info of step is list"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_fault_costs_one_episode(engine, talked, name):
    act, why = WRONG[name]
    played = play(failing(act), engine)
    [failed] = [episode for episode in played.episodes if episode.error]
    assert_same(played, talked, but=failed.number)
    assert failed.finish_reason == FinishReason.ERROR and failed.total_reward != failed.total_reward
    assert re.search(why, failed.error), failed.error
    assert failed.prompt == 2 and played.rollout.finish_reasons[failed.number] == FinishReason.ERROR


def test_a_hang_costs_one_episode_and_its_close_frees_it(engine, talked):
    class Released:
        event = threading.Event()

    def hangs(environment, answer):
        environment.close = Released.event.set
        Released.event.wait(60)
        return answer

    start = time.monotonic()
    played = play(failing(hangs), engine, call_timeout=1.0)
    assert time.monotonic() - start < 30
    [failed] = [episode for episode in played.episodes if episode.error]
    assert "step took longer than 1 s" in failed.error
    assert_same(played, talked, but=failed.number)


def test_a_coroutine_that_hangs_is_cancelled(engine, talked):
    cancelled = []

    class Hangs(Async):
        async def step(self, completion):
            answer = await super().step(completion)
            if answer[2] and not cancelled:
                cancelled.append(1)
                try:
                    await asyncio.sleep(600)
                except asyncio.CancelledError:
                    cancelled.append(2)
                    raise
            return answer

    played = play(Hangs, engine, call_timeout=1.0)
    [failed] = [episode for episode in played.episodes if episode.error]
    assert "longer than 1 s" in failed.error and cancelled == [1, 2]
    assert_same(played, talked, but=failed.number)


class Served(Talk):
    """Asks a process of its own, which it started, and ends it when it is closed."""

    def __init__(self):
        self.server = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, text):
        self.server.stdin.write(text + "\n")
        self.server.stdin.flush()
        return self.server.stdout.readline().removesuffix("\n")

    def step(self, completion):
        return super().step(self.ask(completion))

    def close(self):
        self.server.kill()
        self.server.wait()


@pytest.mark.parametrize(
    ("number", "why"), [(signal.SIGKILL, "step failed: BrokenPipeError"), (signal.SIGSTOP, "step took longer than 2 s")]
)
def test_a_process_that_is_killed_or_stopped_costs_one_episode(engine, talked, number, why):
    """And no process is left."""
    struck = []

    class Struck(Served):
        def step(self, completion):
            if len(self.said) == 1 and not struck:
                struck.append(self.server.pid)
                os.kill(self.server.pid, number)
                if number == signal.SIGKILL:
                    self.server.wait()
            return super().step(completion)

    before = psutil.Process().children()  # what other tests keep
    played = play(Struck, engine, call_timeout=2.0)
    [failed] = [episode for episode in played.episodes if episode.error]
    assert failed.error.startswith(why)
    assert_same(played, talked, but=failed.number)
    deadline = time.monotonic() + 10
    while set(psutil.Process().children()) - set(before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(psutil.Process().children()) - set(before)


@pytest.mark.parametrize("where", ["factory", "reset"])
def test_episodes_that_cannot_begin(engine, where):
    """None can, and there is a rollout of prompts alone."""

    class Broken(Talk):
        def __init__(self):
            assert where != "factory", "no server"

        def reset(self, row, seed):
            raise RuntimeError("no server")

    played = play(Broken, engine)
    assert played.rollout.num_actions == 0 and played.rollout.num_sequences == EPISODES
    assert all("reset failed" in e.error and "no server" in e.error for e in played.episodes)


@pytest.mark.parametrize("ends", [True, False], ids=["at the end", "on the way"])
def test_tokens_that_the_model_does_not_know_cost_their_episodes(ends):
    """A tokenizer with a letter more than the model."""

    class Foreign(Talk):
        def reset(self, row, seed):
            self.row = row
            return "z" if row["prompt"] == "ab" else super().reset(row, seed)

        def step(self, completion):
            answer = super().step(completion)
            return ("z", 0.0, False, ends, {}) if self.row["prompt"] == "f" else answer

    model = make_engine().model
    played = play(Foreign, Engine(model, make_tokenizer(LETTERS + "z"), max_batch_size=4))
    assert [e.number for e in played.episodes if e.error] == [0, 1, 4, 5]
    assert "token ids from 18 to 18, expected 0 to 17" in played.episodes[0].error
    assert "tokens[0] is 18" in played.episodes[4].error


def test_tools_that_no_template_shows_are_an_error_of_the_episode(engine):
    """Where a function makes the environment, nobody can know of its tools before."""

    class Tooled(Talk):
        tools = [{"type": "function", "function": {"name": "f", "description": ".", "parameters": {}}}]

    played = play(lambda: Tooled(), engine)
    assert all("tools need prompts that a chat template renders" in e.error for e in played.episodes)


def test_one_that_cannot_begin_leaves_the_others(engine, talked):
    class Picky(Talk):
        def reset(self, row, seed):
            return "a" * 300 if row["prompt"] == "cde" else super().reset(row, seed)

    played = play(Picky, engine)
    assert [e.number for e in played.episodes if e.error] == [2, 3]
    assert "the first observation has 300 tokens, expected 1 to 255" in played.episodes[2].error
    keep = [0, 1, 4, 5, 6, 7]
    assert torch.equal(played.rollout.select(keep).tokens, talked.rollout.select(keep).tokens)
    assert torch.equal(played.rollout.select(keep).logprobs, talked.rollout.select(keep).logprobs)


def test_what_ends_a_play_closes_its_environments(engine, talked):
    closed, calls = [], []

    class Closes(Talk):
        def close(self):
            closed.append(self)

    def check():
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt

    player = EpisodePlayer(Closes, engine, EnvironmentConfig())
    with pytest.raises(KeyboardInterrupt):
        play(None, engine, player=player, check=check)
    assert_same(play(None, engine, player=player), talked)
    player.close()
    deadline = time.monotonic() + 10
    while len(closed) < 2 * EPISODES and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(closed) == 2 * EPISODES


def test_a_limit_beyond_the_context_is_refused(engine):
    with pytest.raises(ValueError, match="max_tokens is 257, expected at most the model's context of 256"):
        EpisodePlayer(Talk, engine, EnvironmentConfig(max_tokens=257))


def test_what_is_no_factory_is_refused(engine):
    with pytest.raises(TypeError, match="int is no environment, expected a class or a function that makes one"):
        EpisodePlayer(5, engine, EnvironmentConfig())
