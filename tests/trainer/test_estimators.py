"""Training without a critic, end to end: every estimator, checkpoints, invalid samples, a critic that nobody builds."""

from __future__ import annotations

import math

import pytest
import torch

from fastppo.run_folder import read_metrics
from tests.tiny_trainer import count_a
from tests.tolerance import assert_rounds_to
from tests.trainer.test_learning import learn, shuffled

CRITICLESS = ["grpo", "dr_grpo", "rloo", "reinforce++", "remax", "opo"]
GROUPED = {"rollout__samples_per_prompt": 4}


@pytest.mark.parametrize("estimator", CRITICLESS)
def test_a_run_without_a_critic(make_trainer, tmp_path, estimator):
    trainer = make_trainer(advantage__estimator=estimator, **GROUPED)
    before = trainer.model.model.layers[0].mlp.up_proj.weight.clone()
    metrics = trainer.train()
    assert trainer.roles.critic is None and trainer.roles.value_head is None
    assert list(trainer.learner.optimizers) == ["policy"]
    assert all(map(math.isfinite, metrics.values()))
    odd = [name for name in metrics if name.startswith("val/") or "critic" in name or "value" in name]
    assert not odd
    assert {"policy/ratio_avg", "loss/policy_avg", "grad_norm/policy"} <= metrics.keys()
    assert not torch.equal(before, trainer.model.model.layers[0].mlp.up_proj.weight)
    files = {path.name for path in next((tmp_path / "run" / "checkpoints").iterdir()).iterdir()}
    assert not any("critic" in name for name in files)


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_v_trace_trains(make_trainer, tmp_path, critic):
    """It learns otherwise than generalised estimation where sampling drops unlikely tokens, and as that does where it does not."""
    weights = {}
    for top_p in (0.7, 1.0):
        for estimator in ("gae", "vtrace"):
            trainer = make_trainer(
                output_dir=tmp_path / f"{estimator}{top_p}",
                advantage__estimator=estimator,
                advantage__gae_lambda=1.0,
                critic__kind=critic,
                rollout__top_p=top_p,
                total_steps=1,
            )
            metrics = trainer.train()
            assert all(map(math.isfinite, metrics.values())) and "val/explained_var" in metrics
            weights[estimator, top_p] = trainer.model.lm_head.weight.clone()
    assert not torch.equal(weights["vtrace", 0.7], weights["gae", 0.7])
    assert_rounds_to(weights["vtrace", 1.0], weights["gae", 1.0].double())


@pytest.mark.parametrize("estimator", ["grpo", "remax"])
def test_a_run_without_a_critic_goes_on_bitwise(make_trainer, tmp_path, estimator):
    settings = GROUPED | {"advantage__estimator": estimator, "total_steps": 3, "checkpoint__every": 1}
    whole = make_trainer(**settings, output_dir=tmp_path / "whole")
    whole.train()
    calls = []

    def failing(prompts, completions, **_):
        calls.append(1)
        if len(calls) > (4 if estimator == "remax" else 2):
            raise KeyboardInterrupt
        return count_a(prompts, completions)

    with pytest.raises(KeyboardInterrupt):
        make_trainer(failing, **settings).train()
    resumed = make_trainer(**settings)
    resumed.train(resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_invalid_samples_leave_their_group(make_trainer):
    """The others of the prompt are compared with each other; one that is left alone learns nothing."""

    def reward(prompts, completions, **_):
        return [float(i) if i % 4 == 0 or (i % 4 == 1 and i > 4) else math.nan for i in range(len(completions))]

    trainer = make_trainer(
        reward, advantage__estimator="rloo", reward__max_failure_rate=0.9, learner__num_minibatches=1, **GROUPED
    )
    seen = []
    credit = trainer.algorithm.credit
    trainer.algorithm.credit = lambda *records: seen.append((records, credit(*records))) or seen[-1][1]
    trainer.train()
    (rollout, _, scores), targets = seen[0]
    firsts = targets.advantages[rollout.action_cu_seqlens[:-1].long()]
    assert scores.values.tolist()[:3] == [0, 4, 5]
    assert firsts.tolist()[:3] == [0, -1, 1]


def test_a_prompt_without_a_greedy_score_is_left_out(make_trainer):
    """ReMax has nothing to compare its samples with; they count as failures."""
    calls = []

    def reward(prompts, completions, **_):
        calls.append(len(completions))
        if len(calls) == 1:  # the greedy completions come first
            return [None, *[0.5] * (len(completions) - 1)]
        return count_a(prompts, completions)

    metrics = make_trainer(reward, advantage__estimator="remax", total_steps=1).train()
    assert calls == [8, 8]
    assert metrics["objective/scores"] <= 1 and math.isfinite(metrics["loss/policy_avg"])


@pytest.mark.slow
@pytest.mark.parametrize("estimator", CRITICLESS)
def test_it_learns_without_a_critic(make_trainer, tmp_path, estimator):
    # Where the end is banned, what ReMax pushes down where greedy is better goes to the end's probability, unseen.
    settings = {"total_steps": 40, "rollout__min_new_tokens": 0} if estimator == "remax" else {"total_steps": 30}
    learn(make_trainer, tmp_path, advantage__estimator=estimator, **settings)
    rows = read_metrics(tmp_path / "run")
    scores = [row["objective/scores"] for row in rows if row["step"]]
    assert scores[0] < 0.15
    assert sum(scores[-3:]) / 3 > 0.85
    assert "val/explained_var" not in rows[-1]


@pytest.mark.slow
@pytest.mark.parametrize("estimator", CRITICLESS)
def test_nothing_is_learned_from_shuffled_rewards(make_trainer, tmp_path, estimator):
    first, last = learn(make_trainer, tmp_path, reward=shuffled, advantage__estimator=estimator)
    assert first < 0.2 and last < 0.25


@pytest.mark.slow
@pytest.mark.parametrize("estimator", CRITICLESS)
def test_nothing_is_learned_at_learning_rate_zero(make_trainer, tmp_path, estimator):
    first, last = learn(make_trainer, tmp_path, advantage__estimator=estimator, optimizer__lr=0.0, total_steps=3)
    assert first < 0.2 and last < 0.2
