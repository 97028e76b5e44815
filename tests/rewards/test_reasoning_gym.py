"""Tasks of reasoning-gym: their problems as data, their verifiers as rewards."""

from __future__ import annotations

import math
import sys

import pytest

from fastppo.data import load_prompts, load_train_and_eval
from fastppo.recipe_config import DataConfig
from fastppo.rewards import RewardRunner, reasoning_gym
from fastppo.rewards.reasoning_gym import answer_in, task_rows
from tests.tiny import make_tokenizer

pytest.importorskip("reasoning_gym", reason="pip install fastppo[reasoning-gym]")

COLUMNS = ("question", "answer", "metadata", "task", "task_arguments")


def columns_of(rows):
    return {name: [row[name] for row in rows] for name in COLUMNS}


@pytest.mark.parametrize("task", ["countdown", "chain_sum", "puzzle24", "spell_backward", "sudoku", "letter_counting"])
def test_a_tasks_own_answers_are_right_and_others_are_not(make, task):
    rows = task_rows(task, {"size": 6, "seed": 1})
    runner = make(reasoning_gym, None, retries=0)
    right = runner(
        [row["prompt"] for row in rows], [f"<answer>{row['answer']}</answer>" for row in rows], columns_of(rows)
    )
    assert right.errors == [] and right.scores == [1.0] * 6
    wrong = runner([row["prompt"] for row in rows], ["", *["<answer>none</answer>"] * 5], columns_of(rows))
    assert wrong.errors == [] and all(score < 0.5 for score in wrong.scores)


def test_problems_of_several_tasks_are_scored_each_by_its_own():
    rows = task_rows("chain_sum", {"size": 2}) + task_rows("countdown", {"size": 2, "seed": 7})
    texts = [f"<think>so</think>{row['answer']}" for row in rows]
    assert reasoning_gym(texts, **columns_of(rows)) == [1.0] * 4


def test_the_verifier_has_the_tasks_arguments():
    """puzzle24 looks whether the numbers lie in the range that was asked for."""
    (row,) = task_rows("puzzle24", {"size": 1, "seed": 3})
    narrow = row | {"task_arguments": row["task_arguments"] | {"max_value": max(row["metadata"]["numbers"]) - 1}}
    right, wrong = reasoning_gym([row["answer"]] * 2, **columns_of([row, narrow]))
    assert right == 1.0 > wrong


def test_problems_are_reproducible_and_all_different():
    assert task_rows("countdown", {"size": 5}) == task_rows("countdown", {"size": 5, "seed": 0})
    assert task_rows("countdown", {"size": 5}) != task_rows("countdown", {"size": 5, "seed": 1})
    rows = task_rows("coin_flip", {"size": 400, "max_trials": 4})
    assert 1 < len({row["question"] for row in rows}) == len(rows) < 400


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer> 4 </answer>", "4"),
        ("<answer>3</answer> no: <answer>4</answer> bye", "4"),
        ("<answer>4", "4"),
        ("<think>3</think>\n4\n", "4"),
        ("4", "4"),
        ("", ""),
    ],
)
def test_answer_in(text, answer):
    assert answer_in(text) == answer


def test_a_verifier_that_raises_makes_its_own_score_invalid(make, monkeypatch):
    rows = task_rows("chain_sum", {"size": 2})
    verifier = type(sys.modules[reasoning_gym.__module__]._task("chain_sum", '{"seed": 0, "size": 2}'))
    monkeypatch.setattr(verifier, "score_answer", lambda self, answer, entry: 1.0 if answer == "1" else 1 / 0)
    result = make(reasoning_gym, None)(["p"] * 2, ["1", "2"], columns_of(rows))
    assert result.scores[0] == 1.0 and math.isnan(result.scores[1]) and result.failures == 1


def test_as_data_of_a_recipe(monkeypatch):
    config = DataConfig(
        path="reasoning_gym:chain_sum", eval_size=8, task_arguments={"size": 40, "seed": 5, "max_terms": 3}
    )
    monkeypatch.setattr("fastppo.data.writer.encode_prompt", lambda tokenizer, text, rendered: [1] * len(text))
    train, held_out = load_train_and_eval(config, make_tokenizer())
    assert len(train) + len(held_out) == len(task_rows("chain_sum", config.task_arguments)) and len(held_out) == 8
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    with RewardRunner(reasoning_gym, timeout=None) as runner:
        runner.check_columns(name for name in train[0] if name not in ("prompt", "prompt_ids"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "reasoning_gym:countdwn"}, "reasoning-gym has no task 'countdwn'; the nearest is countdown"),
        (
            {"path": "reasoning_gym:countdown", "task_arguments": {"min_number": 2}},
            "task_arguments is .*'min_number': 2.*, which reasoning_gym:countdown does not take: .*'min_number'",
        ),
        (
            {"path": "reasoning_gym:countdown", "task_arguments": {"min_numbers": 0}},
            "does not take: min_numbers must be",
        ),
        (
            {"path": "reasoning_gym:countdown", "eval_size": 2, "eval_path": "reasoning_gym:countdown"},
            "expected neither with a task: the last eval_size",
        ),
        (
            {"path": "data.jsonl", "eval_size": 2, "eval_path": "reasoning_gym:countdown"},
            "eval_path is 'reasoning_gym:countdown' .*expected neither with a task",
        ),
        (
            {"path": "reasoning_gym:chain_sum", "eval_size": 500},
            r"eval_size is 500, expected less than 4\d\d, the number of rows in reasoning_gym:chain_sum",
        ),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        load_train_and_eval(DataConfig(**settings), make_tokenizer())


def test_arguments_of_no_task_are_refused():
    with pytest.raises(ValueError, match="task_arguments is set, but the prompts are not those of a task"):
        load_prompts(["ab"], make_tokenizer(), DataConfig(task_arguments={"size": 3}))


def test_without_reasoning_gym(monkeypatch):
    sys.modules[reasoning_gym.__module__]._task.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    for ask in (lambda: RewardRunner(reasoning_gym, timeout=None), lambda: task_rows("countdown", {})):
        with pytest.raises(ImportError, match=r"pip install fastppo\[reasoning-gym\]"):
            ask()
