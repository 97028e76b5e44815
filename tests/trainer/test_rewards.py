"""What a run says and records of its rewards: failures in evaluation, errors of single batches, scores that cannot be trained on."""

from __future__ import annotations

import io
import math
import os
import random

import numpy as np
import pytest
import torch
from rich.console import Console

from fastppo import PPOTrainer
from fastppo.console import SHOWN_NOTES, Reporter
from fastppo.rewards import WeightedReward, soft_overlong
from fastppo.run_folder import read_metrics
from fastppo.trainer import TrainingError
from tests.tiny import make_model, make_tokenizer
from tests.tiny_trainer import PROMPTS, count_a, tiny_config

HELD_OUT = ["ab", "cd", "ef", "gh"]


@pytest.fixture
def run(tmp_path):
    """run(reward, **config changes) -> (metrics rows, what the console showed)"""

    def run_it(reward, *, prompts=PROMPTS, eval_prompts=None, **changes):
        screen = io.StringIO()
        config = tiny_config(tmp_path / "run", **{"reward__retries": 0} | changes)
        reporter = Reporter(config.total_steps, console=Console(file=screen, width=200))
        trainer = PPOTrainer(
            make_model(),
            reward=reward,
            prompts=prompts,
            eval_prompts=eval_prompts,
            config=config,
            tokenizer=make_tokenizer(),
            reporter=reporter,
        )
        trainer.train()
        return read_metrics(tmp_path / "run"), screen.getvalue()

    return run_it


def in_evaluation(act):
    """A reward that is count_a while it trains, and `act(completions)` on the four held-out completions."""

    def reward(prompts, completions):
        return act(completions) if len(completions) == len(HELD_OUT) else count_a(prompts, completions)

    return reward


def raises(completions):
    raise KeyError("no such column")


@pytest.mark.parametrize(
    ("act", "failures", "words"),
    [
        (raises, 4, ["KeyError: 'no such column'", "4 of 4 completions have no valid score; there is no eval/scores"]),
        (
            lambda completions: [None, None, 0.5, None],
            3,
            ["no reward applies", "3 of 4 completions have no valid score; eval/scores is the mean of the other 1"],
        ),
        (lambda completions: [0.5, math.nan, 0.5, 0.5], 1, ["NaN or infinity", "1 of 4 completions"]),
        (lambda completions: [0.5] * 3, 4, ["returned 3 scores, expected 4", "4 of 4"]),
        (lambda completions: [0.5] * 4, 0, []),
    ],
    ids=["raises", "mostly None", "NaN", "too few", "sound"],
)
def test_failures_in_evaluation_are_counted_and_said(run, act, failures, words):
    rows, shown = run(in_evaluation(act), eval_prompts=HELD_OUT, total_steps=1)
    assert [row["eval/failures"] for row in rows] == [failures] * 2
    assert [row["eval/scores"] for row in rows] == [None if failures == 4 else 0.5] * 2
    assert all(word in shown for word in words) and ("held out: " in shown) == bool(failures)


def test_errors_of_partly_failed_batches_are_shown_once_each(run):
    calls = []

    def flaky(prompts, completions):
        calls.append(1)
        scores = count_a(prompts, completions)
        return [math.nan, *scores[1:]] if len(calls) > 1 else scores

    rows, shown = run(flaky, total_steps=4)
    assert [row["rewards/failures"] for row in rows] == [0, 1, 1, 1]
    assert shown.count("gave NaN or infinity for 1 of 8 completions") == 1


def test_an_attempt_that_a_retry_made_good_is_shown(run):
    calls = []

    def flaky(prompts, completions):
        calls.append(1)
        if len(calls) == 1:
            raise OSError("connection reset")
        return count_a(prompts, completions)

    rows, shown = run(flaky, reward__retries=1)
    assert [row["rewards/failures"] for row in rows] == [0, 0]
    assert shown.count("OSError: connection reset") == 1


def test_many_different_errors_are_shown_up_to_a_bound():
    screen = io.StringIO()
    reporter = Reporter(1, console=Console(file=screen, width=200))
    for length in range(1, 3 * SHOWN_NOTES):
        reporter.note_once("x" * length)
        reporter.note_once("x" * length)
    lines = screen.getvalue().splitlines()
    assert len(lines) == SHOWN_NOTES + 1 and lines[-1] == "further notes of this kind are not shown"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (1e300, r"more than 1e\+12 in size"),
        (3e38, r"more than 1e\+12 in size"),
        (math.inf, "NaN or infinity"),
        (None, "no reward applies"),
    ],
)
def test_scores_that_cannot_be_trained_on_stop_the_run_with_the_true_reason(run, value, reason):
    with pytest.raises(TrainingError, match=reason):
        run(lambda completions: [value] * len(completions))


@pytest.mark.parametrize("size", [1e9, 1e12])
def test_the_largest_scores_are_trained_on(run, size):
    """Not skipped: whitened advantages, the critic's loss and the gradients' norm stay finite."""

    def reward(prompts, completions):
        return [size * score - size / 2 for score in count_a(prompts, completions)]

    rows, _ = run(reward)
    assert all(math.isfinite(row["loss/value_avg"]) and math.isfinite(row["grad_norm/critic"]) for row in rows)
    assert [row["update/skipped"] for row in rows] == [0, 0]


def needs(answer, completions):
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": needs}, r"prompts: reward 'needs' asks for 'answer', expected one of 'prompts', 'completions'"),
        ({"reward": needs, "prompts": [{"prompt": "ab", "anser": 1}]}, "did you mean 'anser'"),
        (
            {"reward": needs, "prompts": [{"prompt": "ab", "answer": 1}], "eval_prompts": ["cd"]},
            "eval_prompts: reward 'needs' asks for 'answer'",
        ),
        ({"prompts": [{"prompt": "ab", "completions": "x"}]}, "column 'completions', a name that fastppo gives away"),
        ({"reward": torch.nn.Linear(2, 2)}, "reward: .*is a model, Linear, expected a function"),
        ({"reward": make_model()}, "reward: .*is a model, LlamaForCausalLM"),
        ({"reward": [count_a, dict]}, "is the class dict"),
        ({"reward": io.StringIO}, r"reward: .*is the class StringIO"),
        ({"reward": "org/reward-model"}, "reward: functions is str"),
    ],
)
def test_what_would_fail_after_the_first_rollout_is_refused_at_construction(make_trainer, tmp_path, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make_trainer(**changes)
    assert not (tmp_path / "run").exists()


def test_a_reward_in_the_trainers_process_cannot_change_the_runs_own_randomness(make_trainer, tmp_path):
    def reseeds_and_draws(prompts, completions):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        random.random(), np.random.rand(), torch.rand(len(completions[0]))
        return count_a(prompts, completions)

    def weights(function, name):
        trainer = make_trainer(function, output_dir=tmp_path / name, total_steps=2)
        trainer.train()
        return trainer.roles.state_dict()

    plain, other = weights(count_a, "plain"), weights(reseeds_and_draws, "other")
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_a_reward_that_edits_its_rows_leaves_the_data_set_as_it_was(make_trainer):
    rows = [{"prompt": prompt, "facts": [1, {"deep": [2]}]} for prompt in PROMPTS]

    def edits(prompts, completions, facts):
        scores = [len(fact) + len(fact[1]["deep"]) for fact in facts]
        for fact in facts:
            fact[1]["deep"].clear()
        prompts.clear(), completions.clear()
        return scores

    trainer = make_trainer(edits, prompts=rows, total_steps=2)
    assert trainer.train()["rewards/edits/mean"] == 3
    assert all(row["facts"] == [1, {"deep": [2]}] for row in trainer.prompts)


def test_a_reward_that_changes_the_directory_in_the_trainers_process_moves_no_record(
    make_trainer, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def moves(prompts, completions):
        os.chdir(tmp_path / "elsewhere")
        return count_a(prompts, completions)

    make_trainer(moves, output_dir="own", total_steps=2, checkpoint__every=1).train()
    assert not list((tmp_path / "elsewhere").iterdir())
    assert len(read_metrics(tmp_path / "own")) == 2 and (tmp_path / "own" / "model").is_dir()


def test_weights_and_normalisation_reach_the_run_and_metrics_stay_raw(run):
    """Of a normalised reward a step's mean is 0; an evaluation, whose scores are compared over steps, has the plain weighted sum."""

    def halves(prompts, completions):
        return [float(index % 2) for index in range(len(completions))]

    reward = [
        WeightedReward(halves, weight=3.0, normalise=True),
        WeightedReward(lambda completions: [1.0] * len(completions), 2.0),
    ]
    rows, _ = run(reward, eval_prompts=HELD_OUT, total_steps=1)
    after = rows[-1]
    assert (after["objective/scores"], after["objective/scores_std"]) == (2.0, 3.0)
    assert (after["rewards/halves/mean"], after["rewards/halves/std"]) == (0.5, 0.5)
    assert [row["eval/scores"] for row in rows] == [3 * 0.5 + 2] * 2


def test_options_that_do_not_fit_are_refused_at_construction(make_trainer, tmp_path):
    with pytest.raises(ValueError, match="reward: reward 'soft_overlong' needs max_completion_len"):
        make_trainer(soft_overlong)
    assert not (tmp_path / "run").exists()
