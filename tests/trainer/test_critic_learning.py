"""PPO learns with each kind of critic, whose values come to explain the returns; from shuffled rewards, and at learning rate 0, neither learns
anything."""

from __future__ import annotations

import pytest

from fastppo.run_folder import read_metrics
from tests.trainer.test_critics import SMALL, save_model
from tests.trainer.test_learning import learn, shuffled

HISTOGRAM = {"critic__value_range": (-0.1, 1.1), "critic__bins": 31}
SAO = {
    "rollout__prompts_per_step": 128,
    "rollout__samples_per_prompt": 1,
    "rollout__recompute_logprobs": "never",
    "advantage__gae_lambda": 0.95,  # not read: the length decides
    "advantage__critic_gae_lambda": 1.0,
    "advantage__length_adaptive_alpha": 1.5,
    "loss__objective": "dis",
    "loss__clip_low": 0.3,
    "loss__clip_high": 5.0,
    "critic__freeze_attention": True,
    "critic__epochs": 2,
    "critic__warmup_steps": 2,
    "learner__epochs": 1,
    "total_steps": 30,
}
KINDS = {
    "smaller model": {"critic__model": "SMALL"},
    "frozen attention": {"critic__freeze_attention": True},
    "two-hot": {"critic__head": "two-hot"} | HISTOGRAM,
    "hl-gauss": {"critic__head": "hl-gauss"} | HISTOGRAM,
    "SAO": SAO,
}


def learn_with(kind, make_trainer, tmp_path, **changes) -> tuple[float, float, float]:
    """(task reward in the first step, over the last ones, most explained variance from the sixth step on)"""
    settings = KINDS[kind]
    if settings.get("critic__model") == "SMALL":
        settings = {"critic__model": save_model(tmp_path / "small", **SMALL)}
    first, last = learn(make_trainer, tmp_path, **settings | changes)
    return first, last, max(row["val/explained_var"] for row in read_metrics(tmp_path / "run")[5:])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_so_does_the_critic(make_trainer, tmp_path, kind):
    first, last, explained = learn_with(kind, make_trainer, tmp_path)
    assert first < 0.15
    assert last > 0.8
    assert explained > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_learned_from_shuffled_rewards(make_trainer, tmp_path, kind):
    first, last, explained = learn_with(kind, make_trainer, tmp_path, reward=shuffled)
    assert first < 0.15 and last < 0.2
    assert explained < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["frozen attention", "SAO"])
def test_nothing_is_learned_at_learning_rate_zero(make_trainer, tmp_path, kind):
    still = {"optimizer__lr": 0.0, "critic__lr": 0.0, "total_steps": 8}
    first, last, explained = learn_with(kind, make_trainer, tmp_path, **still)
    assert first < 0.15 and last < 0.15
    assert explained == 0, "a new head says 0 of every state"
