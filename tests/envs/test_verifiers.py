"""Environments of verifiers, against the installed package: its tasks are rows, its conversations turns, its rewards the reward."""

from __future__ import annotations

import asyncio

import pytest

from fastppo.envs.adapters import Verifiers
from fastppo.rollout import Engine
from tests.envs.tasksets import FILES
from tests.envs.worlds import play, threads
from tests.tiny import make_model, make_tokenizer

pytest.importorskip("verifiers.v1", reason="pip install fastppo[verifiers]", exc_type=ImportError)


@pytest.fixture(autouse=True)
def tasksets(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)


async def conversation(made, row, *answers):
    """What it says, and what it pays in the end; where the answers do not end it, it is cut off."""
    environment = made()
    said, over = [await environment.reset(row)], False
    for answer in answers:
        assert not over
        observation, reward, over, truncated, _ = await environment.step(answer)
        assert reward == 0.0 and not truncated
        said.append(observation)
    paid = await environment.get_reward()
    await environment.close()
    return said, paid


def talk(made, row, *answers):
    return asyncio.run(conversation(made, row, *answers))


def test_tasks_of_one_turn():
    made = Verifiers("fastppo-single", count=2)
    assert made.rows() == [{"prompt": "say a", "task": 0}, {"prompt": "say b", "task": 1}]
    assert talk(made, made.rows()[1], "b") == (["say b", None], 1.5)
    assert talk(made, made.rows()[1], "a") == (["say b", None], 0.5)
    assert talk(made, made.rows()[1], "a b") == (["say b", None], 0.0)


def test_a_conversation():
    made = Verifiers("fastppo-talk")
    assert talk(made, {"task": 2}, "c") == (["say c", None], 3.5)
    assert talk(made, {"task": 2}, "a", "bb", "c") == (["say c", "no", "no", None], 1.5)
    assert talk(made, {"task": 2}, "a", "bb") == (["say c", "no", "no"], 0.0)  # cut off: what was said is scored


def test_the_tasks_own_rules_end_a_conversation():
    assert talk(Verifiers("fastppo-rules"), {"task": 0}, "b", "b") == (["say a", "no", None], 0.5)


def test_a_system_prompt_is_a_message():
    made = Verifiers("fastppo-single")
    made._tasks[0] = made._tasks[0].with_data(system_prompt="Be short.")
    said, _ = talk(made, {"task": 0}, "a")
    assert said[0] == [{"role": "system", "content": "Be short."}, {"role": "user", "content": "say a"}]


def test_episodes():
    """Of one object after another, those that are cut off too; a scoring that fails makes its episodes invalid."""
    tokenizer = make_tokenizer("abcdefghijklmnopqrstuvwxyz ")
    engine = Engine(make_model(vocab_size=len(tokenizer), max_position_embeddings=256), tokenizer, max_batch_size=4)
    made = Verifiers("fastppo-talk")
    played = play(made, engine, rows=made.rows(), max_turns=2, concurrent=2)
    for episode in played.episodes:
        assert episode.error is None and 1 <= len(episode.turns) <= 2 and 0 <= episode.total_reward <= 3.5
    assert any(episode.truncated for episode in played.episodes)
    broken = Verifiers("fastppo-raises")
    failed = play(broken, engine, rows=broken.rows())
    assert all("get_reward failed: TaskError: " in episode.error for episode in failed.episodes)
    for thread in threads():
        thread.join(10)
    assert not threads()


@pytest.mark.parametrize(
    ("taskset", "settings", "error", "message"),
    [
        ("fastppo-nowhere", {}, ModuleNotFoundError, "taskset 'fastppo-nowhere' not found"),
        ("fastppo-single", {"cuont": 2}, ValueError, "cuont"),
        ("fastppo-endless", {}, ValueError, "size is None, expected a number: the taskset fastppo-endless has no end"),
        ("fastppo-seats", {}, ValueError, "the environment has the seats other, player, expected one"),
        ("fastppo-runtime", {}, ValueError, "the tasks need a runtime, expected ones that are scored by what was said"),
    ],
)
def test_what_only_a_harness_can_play_is_refused(taskset, settings, error, message):
    with pytest.raises(error, match=message):
        Verifiers(taskset, **settings)
    if taskset == "fastppo-endless":
        assert len(Verifiers(taskset, size=2).rows()) == 2


def test_rows_have_to_say_which_task():
    with pytest.raises(ValueError, match="the row has no column 'task', expected the rows of"):
        asyncio.run(Verifiers("fastppo-single")().reset({"prompt": "a"}))
