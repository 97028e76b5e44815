"""Prompts whose samples all have the same score are left out, and others sampled for in their place."""

from __future__ import annotations

import math

import pytest
import torch

from fastppo.errors import TrainingError
from fastppo.run_folder import read_metrics
from tests.tiny_trainer import PROMPTS, count_a

SETTINGS = {"rollout__samples_per_prompt": 3, "rollout__dynamic_sampling": True, "advantage__estimator": "grpo"}


def telling(chosen):
    """A reward that tells the samples of some prompts apart, and gives those of all others the same."""

    def reward(prompts, completions, **_):
        return [float(i % 3) if prompt in chosen else 0.5 for i, prompt in enumerate(prompts)]

    return reward


def record(trainer) -> list:
    """(rollout, scores) of every step, as they are learned from."""
    seen, credit = [], trainer.algorithm.credit

    def recording(rollout, evaluation, scores):
        seen.append((rollout, scores))
        return credit(rollout, evaluation, scores)

    trainer.algorithm.credit = recording
    return seen


def test_groups_without_signal_are_replaced(make_trainer, tmp_path):
    """4 of 8 prompts have signal, and 4 are drawn a round: whole groups of these alone, as many as a step is to have."""
    trainer = make_trainer(telling(PROMPTS[::2]), **SETTINGS | {"rollout__prompts_per_step": 4})
    seen = record(trainer)
    metrics = trainer.train()
    letters = {tuple(row["prompt_ids"]) for row in trainer.prompts if row["prompt"] in PROMPTS[::2]}
    for rollout, scores in seen:
        assert rollout.num_sequences == 12 and len(set(rollout.prompt_index.tolist())) == 4
        assert {tuple(prompt) for prompt in rollout.prompts()} <= letters
        assert scores.values.tolist() == [0, 1, 2] * 4
        assert [len(part) for part in rollout.logprobs.split(rollout.action_counts)] == rollout.action_counts
    rows = read_metrics(tmp_path / "run")
    assert all(row["rollout/sampling_rounds"] > 1 for row in rows)
    assert all(0 < row["rollout/signal_rate"] < 1 for row in rows)
    assert metrics["rewards/reward/mean"] < 1, "of all that was sampled"
    assert metrics["objective/scores"] == 1 and all(map(math.isfinite, metrics.values()))


def test_the_rounds_are_limited(make_trainer):
    """Then a step learns from what it has."""
    trainer = make_trainer(telling(PROMPTS[:1]), **SETTINGS | {"rollout__max_sampling_rounds": 2, "total_steps": 1})
    seen = record(trainer)
    metrics = trainer.train()
    assert metrics["rollout/sampling_rounds"] == 2 and metrics["rollout/signal_rate"] == 2 / 16
    assert seen[0][0].num_sequences == 6


def test_no_signal_at_all_ends_the_run_and_says_so(make_trainer):
    with pytest.raises(TrainingError, match="one and the same score in all 3 rounds of rollout.max_sampling_rounds"):
        make_trainer(telling([]), **SETTINGS | {"rollout__max_sampling_rounds": 3}).train()


def test_it_is_free_where_every_group_has_signal(make_trainer, tmp_path):
    """The first round is the one that a step without it makes: the same bits."""
    weights = []
    for on in (False, True):
        trainer = make_trainer(
            telling(PROMPTS), output_dir=tmp_path / str(on), **SETTINGS | {"rollout__dynamic_sampling": on}
        )
        trainer.train()
        weights.append(trainer.model.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value), name


@pytest.mark.parametrize("estimator", ["gae", "remax"])
def test_a_run_goes_on_bitwise(make_trainer, tmp_path, estimator):
    settings = SETTINGS | {"advantage__estimator": estimator, "total_steps": 4, "checkpoint__every": 2}
    settings |= {"rollout__prompts_per_step": 4, "rollout__max_new_tokens": 3, "critic__kind": None}
    if estimator == "gae":
        settings["critic__kind"] = "shared"  # the sampler's values are joined too
    whole = make_trainer(count_a, **settings, output_dir=tmp_path / "whole")
    whole.train()
    make_trainer(count_a, **settings | {"total_steps": 2}).train()
    resumed = make_trainer(count_a, **settings)
    resumed.train(resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert max(row["rollout/sampling_rounds"] for row in read_metrics(tmp_path / "whole")) > 1
