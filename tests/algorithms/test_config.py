"""Settings that need each other are checked together, and what follows from others is filled in."""

from __future__ import annotations

import pytest

from fastppo.recipe import load_recipe
from tests.tiny import ppo_config


def test_what_follows_from_the_estimator():
    assert (ppo_config().critic.kind, ppo_config().advantage.whiten) == ("separate", True)
    for estimator, whitened in (("grpo", False), ("rloo", False), ("reinforce++", True)):
        config = ppo_config(advantage__estimator=estimator, rollout__samples_per_prompt=2)
        assert (config.critic.kind, config.advantage.whiten) == ("none", whitened)


WRONG = {
    "rollout.samples_per_prompt is 1, expected at least 2": {"advantage__estimator": "rloo"},
    "critic.kind is shared, expected none": {"advantage__estimator": "reinforce++", "critic__kind": "shared"},
    "critic.kind is none, expected separate or shared": {"critic__kind": "none"},
    "critic.warmup_steps is 3, expected 0": {"advantage__estimator": "remax", "critic__warmup_steps": 3},
    "critic_gae_lambda is 1.0, expected None": {"advantage__estimator": "opo", "advantage__critic_gae_lambda": 1.0},
    "bootstrap_truncated is True": {"advantage__estimator": "remax", "advantage__bootstrap_truncated": True},
    "length_adaptive_alpha is 0.05, expected None": {
        "advantage__estimator": "vtrace",
        "advantage__length_adaptive_alpha": 0.05,
    },
    "loss.rollout_correction is mask, expected none": {
        "advantage__estimator": "vtrace",
        "loss__rollout_correction": "mask",
    },
    "algorithm is trpo, expected ppo with rollout.staleness 1": {"rollout__staleness": 1, "algorithm": "trpo"},
    "algorithm is expert_iteration, expected ppo with rollout.staleness 1": {
        "rollout__staleness": 1,
        "algorithm": "expert_iteration",
        "rollout__samples_per_prompt": 2,
    },
    "distributed.sharding is full, expected none with rollout.staleness 1": {
        "rollout__staleness": 1,
        "distributed__sharding": "full",
    },
    "gamma is 0.9, expected 1": {"advantage__estimator": "grpo", "advantage__gamma": 0.9},
    "loss.kl_coef is 0, expected a first value above 0": {"loss__kl_target": 1.0},
    "reward.kl_coef is 0, expected a first value above 0": {"reward__kl_target": 1.0},
    "loss.clip_high is set, expected no setting of loss": {"algorithm": "trpo", "loss__clip_high": 0.3},
    "trpo.max_kl is set, expected no setting of trpo": {"trpo__max_kl": 0.02},
    "vtrace_rho_bar is 2.0, expected 1.0": {"advantage__vtrace_rho_bar": 2.0},
    "dual_clip is 3.0, expected none with objective cispo": {"loss__objective": "cispo", "loss__dual_clip": 3.0},
    r"rollout_bounds is \[3.0, 2.0\], expected the lower bound first": {"loss__rollout_bounds": [3.0, 2.0]},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_together_is_refused(message, tmp_path):
    with pytest.raises(ValueError, match=message.removeprefix("loss.").removeprefix("reward.")):
        ppo_config(**WRONG[message])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("total_steps: 1\n")
    overrides = [f"{name.replace('__', '.')}={value}" for name, value in WRONG[message].items()]
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(recipe, overrides)
    assert not str(error.value).startswith(".") and "pydantic" not in str(error.value)
