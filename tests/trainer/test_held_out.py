"""Evaluation: pass@k, greedy beside sampled, several sets, and settings that do not fit each other."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from itertools import combinations

import pytest

from fastppo.held_out import pass_at_k
from fastppo.run_folder import read_metrics
from tests.tiny import ppo_config

PLAIN = {"eval/scores", "eval/failures", "eval/mean_length"}


@pytest.mark.parametrize("samples", range(1, 7))
def test_pass_at_k_is_the_share_of_choices_with_a_solution(samples):
    for solved in range(samples + 1):
        outcomes = [True] * solved + [False] * (samples - solved)
        for k in range(1, samples + 1):
            choices = [any(choice) for choice in combinations(outcomes, k)]
            assert pass_at_k(samples, solved, k) == sum(choices) / len(choices)


@pytest.mark.parametrize("chance", [Fraction(1, 10), Fraction(1, 2), Fraction(5, 7)])
def test_pass_at_k_is_unbiased(chance):
    """Its expectation over the completions is the chance that one of k succeeds; that of 1 - (1 - c/n)^k is not."""
    samples, k = 6, 3

    def expectation(estimate):
        weights = [math.comb(samples, c) * chance**c * (1 - chance) ** (samples - c) for c in range(samples + 1)]
        return sum(weight * estimate(c) for c, weight in enumerate(weights))

    exact = 1 - (1 - chance) ** k
    assert expectation(lambda c: Fraction(pass_at_k(samples, c, k)).limit_denominator(1000)) == exact
    assert expectation(lambda c: 1 - (1 - Fraction(c, samples)) ** k) != exact


def test_pass_at_k_of_many_samples():
    assert pass_at_k(10_000, 1, 10_000) == 1 and pass_at_k(10_000, 0, 10_000) == 0
    assert pass_at_k(10_000, 1, 100) == 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((4, 1, 5), "k is 5, expected from 1 to samples = 4"), ((4, 1, 0), "k is 0"), ((4, 5, 1), "solved is 5")],
)
def test_wrong_counts(arguments, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(*arguments)


def by_prompt(table):
    """A reward that gives the completions of a prompt the scores that the table has for it, one after another."""

    def reward(prompts, completions, **_):
        left = {prompt: list(scores) for prompt, scores in table.items()}
        return [left[prompt].pop(0) if left.get(prompt) else 0.5 for prompt in prompts]

    return reward


SAMPLED = {"evaluation__temperature": 1.0, "evaluation__samples": 4}


def test_pass_at_k_of_an_evaluation(make_trainer):
    """The mean over prompts; completions without a valid score are no samples, and a prompt with fewer than k of them is left out."""
    table = {"ab": [0, 1, 0.9, 0], "cd": [1, math.nan, 1, 0], "ef": [math.nan] * 4}
    trainer = make_trainer(
        by_prompt(table), eval_prompts=list(table), **SAMPLED, evaluation__pass_at_k=[1, 2, 4], reward__solved_score=0.9
    )
    metrics = trainer.evaluate()
    assert metrics.keys() == PLAIN | {"eval/pass@1", "eval/pass@2", "eval/pass@4"}
    assert metrics["eval/pass@1"] == (2 / 4 + 2 / 3) / 2
    assert metrics["eval/pass@2"] == (5 / 6 + 1) / 2
    assert metrics["eval/pass@4"] == 1, "of the first prompt alone"
    assert metrics["eval/failures"] == 5 and metrics["eval/scores"] == 3.9 / 7


def test_solved_is_compared_as_scores_are_kept(make_trainer):
    """0.7 in fp32 is less than in fp64."""
    trainer = make_trainer(
        lambda prompts, completions, **_: [0.7] * len(prompts),
        eval_prompts=["ab"],
        evaluation__pass_at_k=1,
        reward__solved_score=0.7,
    )
    assert trainer.evaluate()["eval/pass@1"] == 1


def test_one_set_has_the_metrics_of_before(make_trainer):
    assert make_trainer(eval_prompts=["ab", "cd"]).evaluate().keys() == PLAIN


def test_sets_are_evaluated_each_for_itself(make_trainer):
    """The numbers of a set are those that it has alone; `eval/scores`, which displays and curves show, is the mean of the sets'."""
    sets = {"short": ["ab", "cd"], "long": ["abcdefgh"]}
    alone = {name: make_trainer(eval_prompts=prompts, **SAMPLED).evaluate() for name, prompts in sets.items()}
    together = make_trainer(eval_prompts=sets, **SAMPLED).evaluate()
    for name, metrics in alone.items():
        for metric, value in metrics.items():
            assert together[metric.replace("eval/", f"eval/{name}/")] == value
    assert together["eval/scores"] == sum(metrics["eval/scores"] for metrics in alone.values()) / 2
    assert len(together) == 2 * 3 + 1


def test_greedy_beside_sampled(make_trainer):
    sampled = {**SAMPLED, "evaluation__pass_at_k": [4]}
    greedy = make_trainer(eval_prompts=["ab", "cd"], evaluation__pass_at_k=1).evaluate()
    alone = make_trainer(eval_prompts=["ab", "cd"], **sampled).evaluate()
    both = make_trainer(eval_prompts=["ab", "cd"], **sampled, evaluation__greedy=True).evaluate()
    assert both == alone | {name.replace("eval/", "eval/greedy/"): value for name, value in greedy.items()}


def test_failures_of_a_named_set_are_said(make_trainer):
    trainer = make_trainer(
        by_prompt({"ab": [math.nan]}), eval_prompts={"hard": ["ab", "cd"], "other": ["cd"]}, total_steps=1
    )
    notes = []
    trainer.reporter.note = notes.append
    trainer.evaluate()
    assert "held out: 1 of 2 completions have no valid score; eval/hard/scores is the mean of the other 1" in notes


def test_a_set_without_any_score_leaves_no_mean_that_could_be_compared(make_trainer, tmp_path):
    make_trainer(by_prompt({"ab": [math.nan]}), eval_prompts={"a": ["ab"], "b": ["cd"]}, total_steps=1).train()
    assert [row["eval/scores"] for row in read_metrics(tmp_path / "run")] == [None, None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_prompts": {}}, "eval_prompts is an empty mapping, expected at least one set"),
        ({"eval_prompts": {"a/b": ["ab"]}}, "eval_prompts has a set named 'a/b', expected letters, digits"),
        ({"eval_prompts": {3: ["ab"]}}, "eval_prompts has a set named 3"),
        ({"eval_prompts": {"easy": [""]}}, "eval_prompts['easy']: "),
        (
            {"evaluation__keep_best": True},
            "eval_prompts is None, expected held-out rows with evaluation.keep_best True",
        ),
        (
            {"evaluation__patience": 2, "evaluation__every": 1},
            "eval_prompts is None, expected held-out rows with evaluation.patience 2",
        ),
    ],
)
def test_bad_arguments_write_nothing(make_trainer, tmp_path, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_trainer(**changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evaluation__samples": 4}, "samples is 4, expected 1 with temperature 0"),
        ({"evaluation__greedy": True}, "greedy is True, expected False with temperature 0"),
        ({**SAMPLED, "evaluation__pass_at_k": [1, 8]}, "pass_at_k is [1, 8], expected at most samples = 4"),
        ({"evaluation__patience": 3}, "patience is 3, expected None with every 0"),
        ({"evaluation__goal": "most"}, "goal"),
        ({"evaluation__pass_at_k": [0]}, "pass_at_k"),
        ({"evaluation__min_improvement": -1}, "min_improvement"),
        ({"difficulty__easy_weight": 0}, "easy_weight"),
        ({"difficulty__hard_rate": 1.0}, "hard_rate is 1.0, expected less than easy_rate = 1.0"),
        ({"reward__solved_score": math.nan}, "solved_score"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ppo_config(**settings)
