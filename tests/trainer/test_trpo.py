"""TRPO end to end: the KL limit holds in every step, and it learns."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch

from fastppo import PPOConfig, PPOTrainer
from fastppo.console import Reporter
from fastppo.run_folder import read_metrics
from tests.test_readme import load_demo
from tests.tiny import make_model
from tests.trainer.test_learning import learn, shuffled

TRPO = {"algorithm": "trpo", "rollout__samples_per_prompt": 4}


def mean_kl(old, new, rollout) -> float:
    """KL(old || new) in fp64 over the states of the rollout, by Transformers' own forward pass."""
    kls = []
    for model in (old, new):
        model.set_attn_implementation("sdpa")
    for tokens, mask in zip(
        rollout.tokens.split(rollout.lengths), rollout.action_mask.split(rollout.lengths), strict=True
    ):
        states = mask.nonzero().squeeze(1) - 1
        p, q = (
            (model(input_ids=tokens[None]).logits[0][states].double() / rollout.temperature).log_softmax(-1)
            for model in (old, new)
        )
        kls.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(kls).mean().item()


@pytest.mark.parametrize("max_kl", [0.001, 0.02])
@pytest.mark.parametrize("variant", ["separate", "shared", "grpo"])
def test_the_kl_limit_holds_in_every_step(make_trainer, tmp_path, variant, max_kl):
    kind = {"advantage__estimator": "grpo"} if variant == "grpo" else {"critic__kind": variant}
    trainer = make_trainer(**TRPO, **kind, trpo__max_kl=max_kl, total_steps=5)
    update, measured = trainer.algorithm.update, []

    def checked(learner, rollout, *records):
        before = copy.deepcopy(learner.roles.policy)
        metrics = update(learner, rollout, *records)
        with torch.no_grad():
            measured.append(mean_kl(before, copy.deepcopy(learner.roles.policy), rollout))
        return metrics

    trainer.algorithm.update = checked
    metrics = trainer.train()
    rows = read_metrics(tmp_path / "run")
    assert all(kl <= max_kl for kl in measured)
    assert [row["policy/kl"] for row in rows] == pytest.approx(measured, rel=1e-3)
    moved = [row for row in rows if row["policy/step_share"] > 0]
    assert len(moved) >= 4 and all(row["policy/surrogate_gain"] > 0 for row in moved)
    assert max(measured) > 0.3 * max_kl, "a step uses what it is allowed"
    assert all(map(math.isfinite, metrics.values()))
    assert ("loss/value_avg" in metrics) == (variant != "grpo")
    assert not any(name.startswith("policy/clipfrac") for name in metrics)


def test_the_critics_warm_up_leaves_the_policy_alone(make_trainer, tmp_path):
    trainer = make_trainer(**TRPO, critic__warmup_steps=1)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    heads = trainer.roles.critic.head.weight.clone()
    update = trainer.algorithm.update

    def checked(*records):
        metrics = update(*records)
        same = all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
        assert same == (trainer.step == 0)
        assert not torch.equal(heads, trainer.roles.critic.head.weight)
        return metrics

    trainer.algorithm.update = checked
    trainer.train()
    assert ["policy/kl" in row for row in read_metrics(tmp_path / "run")] == [False, True]


def test_a_run_goes_on_bitwise(make_trainer, tmp_path):
    settings = TRPO | {"total_steps": 4, "checkpoint__every": 2}
    whole = make_trainer(**settings, output_dir=tmp_path / "whole")
    whole.train()
    make_trainer(**settings | {"total_steps": 2}).train()
    resumed = make_trainer(**settings)
    resumed.train(resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_rounded_weights_are_refused_before_anything_is_written(make_trainer, tmp_path):
    with pytest.raises(ValueError, match="expected torch.float32 with algorithm trpo"):
        make_trainer(model=make_model().bfloat16(), **TRPO)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["gae", "grpo"])
def test_it_learns_the_bandit(make_trainer, tmp_path, estimator):
    first, last = learn(
        make_trainer,
        tmp_path,
        algorithm="trpo",
        trpo__max_kl=0.05,
        advantage__estimator=estimator,
        total_steps=36,
    )
    assert first < 0.15
    assert last > 0.9
    assert all(row["policy/kl"] <= 0.05 for row in read_metrics(tmp_path / "run"))


@pytest.mark.slow
def test_nothing_is_learned_from_shuffled_rewards(make_trainer, tmp_path):
    bandit = {"algorithm": "trpo", "trpo__max_kl": 0.05, "advantage__estimator": "grpo"}
    first, last = learn(make_trainer, tmp_path, reward=shuffled, total_steps=20, **bandit)
    assert first < 0.15 and last < 0.25


@pytest.mark.slow
def test_nothing_is_learned_within_no_distance(make_trainer, tmp_path):
    """Its learning rate is the KL limit."""
    first, last = learn(make_trainer, tmp_path, algorithm="trpo", trpo__max_kl=1e-12, critic__lr=0.0, total_steps=6)
    assert first < 0.15 and last < 0.15


@pytest.mark.slow
def test_it_learns_arithmetic(tmp_path):
    """The demo's pupil who forgets his carries is taught to carry, by its right answers alone; the KL limit holds in every step."""
    demo, rng = load_demo(), random.Random(0)
    torch.manual_seed(0)
    tokenizer = demo.make_tokenizer()
    model, problems = demo.make_model(tokenizer), demo.make_problems(rng, demo.TRAIN)
    demo.imitate(model, tokenizer, [row["prompt"] for row in problems], rng, str(tmp_path / "imitation"))
    config = PPOConfig(
        algorithm="trpo",
        output_dir=str(tmp_path / "run"),
        device="cpu",
        total_steps=10,
        rollout={
            "prompts_per_step": 64,
            "samples_per_prompt": 4,
            "batch_size": 256,
            "max_new_tokens": demo.MAX_NEW_TOKENS,
        },
        reward={"timeout": None},
        advantage={"estimator": "grpo"},
        trpo={"cg_iterations": 6},
    )
    PPOTrainer(
        model,
        reward=demo.right_answer,
        prompts=problems,
        config=config,
        tokenizer=tokenizer,
        reporter=Reporter(10, quiet=True),
    ).train()
    rows = read_metrics(tmp_path / "run")
    assert rows[0]["objective/scores"] < 0.3
    assert rows[-1]["objective/scores"] > 0.85
    assert all(row["policy/kl"] <= 0.01 for row in rows)
