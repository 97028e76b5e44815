"""Every term of the loss is reached from the settings, end to end."""

from __future__ import annotations

import math

import pytest
import torch

from fastppo.run_folder import read_metrics

SETTINGS = {"optimizer__lr": 1e-2, "learner__epochs": 2, "rollout__samples_per_prompt": 2}
# setting(s) -> a metric that the run then has, or None
TERMS = {
    "cispo": ({"loss__objective": "cispo"}, None),
    "gspo": ({"loss__ratio_level": "sequence", "loss__clip_low": 3e-4, "loss__clip_high": 4e-4}, None),
    "clip-higher": ({"loss__clip_high": 0.5}, None),
    "clip-low alone": ({"loss__clip_low": 1.5}, None),
    "dual clip": ({"loss__dual_clip": 1.01}, None),
    "entropy bonus": ({"loss__entropy_coef": 0.5}, None),
    "Dr. GRPO's denominator": ({"loss__aggregation": "fixed-denominator"}, None),
    "KL in the loss, k3": ({"loss__kl_coef": 0.5}, "loss/kl_avg"),
    "KL in the loss, k3 with k2's gradient": ({"loss__kl_coef": 0.5, "loss__kl_estimator": "k3+"}, "loss/kl_avg"),
    "KL in the loss, k1": ({"loss__kl_coef": 0.5, "loss__kl_estimator": "k1"}, "loss/kl_avg"),
    "KL in the loss, k2": ({"loss__kl_coef": 0.5, "loss__kl_estimator": "k2"}, "loss/kl_avg"),
    "adaptive KL in the loss": ({"loss__kl_coef": 0.5, "loss__kl_target": 0.1, "loss__kl_horizon": 16}, "loss/kl_coef"),
    "adaptive KL in the reward": (
        {"reward__kl_coef": 0.5, "reward__kl_target": 0.1, "reward__kl_horizon": 16},
        "objective/kl_coef",
    ),
    "target entropy": ({"loss__entropy_target": 9.0, "loss__entropy_coef_step": 0.5}, "loss/entropy_coef"),
    "NLL of good completions": ({"loss__positive_nll_coef": 0.5}, "loss/positive_nll_avg"),
    "no truncated completions": ({"loss__mask_truncated_completions": True}, None),
} | {
    f"{how} weights of a {level}": (
        {
            "rollout__top_p": 0.8,
            "loss__rollout_correction": how,
            "loss__rollout_correction_level": level,
            "loss__rollout_bounds": (0.1, 0.95),
        },
        "rollout/weight_avg",
    )
    for how in ("truncate", "mask")
    for level in ("token", "sequence", "geometric")
}


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.fixture
def plain(make_trainer, tmp_path):
    """(metrics, weights) of the same run without a term."""

    def run(**settings):
        trainer = make_trainer(output_dir=tmp_path / "plain", **SETTINGS | settings)
        return trainer.train(), weights(trainer)

    return run


@pytest.mark.parametrize("term", TERMS)
def test_a_term_of_the_loss(make_trainer, plain, term):
    """It changes what is learned, all stays finite, and a metric says that it is on."""
    changes, metric = TERMS[term]
    trainer = make_trainer(**SETTINGS | changes)
    metrics = trainer.train()
    assert all(map(math.isfinite, metrics.values()))
    sampling = {name: value for name, value in changes.items() if name.startswith("rollout__")}
    without, plain_weights = plain(**sampling)
    found = weights(trainer)
    assert any(not torch.equal(found[name], value) for name, value in plain_weights.items())
    if metric is not None:
        assert metric in metrics and metric not in without


@pytest.mark.parametrize("estimator", ["gae", "grpo"])
def test_coefficients_that_move_go_on_after_a_resume(make_trainer, tmp_path, estimator):
    settings = SETTINGS | {
        "advantage__estimator": estimator,
        "total_steps": 4,
        "checkpoint__every": 2,
        "loss__kl_coef": 0.5,
        "loss__kl_target": 0.1,
        "loss__kl_horizon": 16,
        "reward__kl_coef": 0.2,
        "reward__kl_target": 50.0,
        "reward__kl_horizon": 16,
        "loss__entropy_target": 9.0,
    }
    whole = make_trainer(**settings, output_dir=tmp_path / "whole")
    whole.train()
    make_trainer(**settings | {"total_steps": 2}).train()
    resumed = make_trainer(**settings)
    resumed.train(resume=True)
    for name, value in weights(whole).items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    names = ("objective/kl_coef", "loss/kl_coef", "loss/entropy_coef")
    rows = [[row[name] for name in names] for row in read_metrics(tmp_path / "whole")]
    assert rows == [[row[name] for name in names] for row in read_metrics(tmp_path / "run")]
    assert rows[0] == [0.2, 0.5, 0.0]
    assert rows[3][0] < rows[2][0] < 0.2 and rows[3][1] > rows[2][1], "the KL is below the one target, above the other"
    assert rows[3][2] == pytest.approx(3e-4)


def test_sampling_from_another_distribution_says_what_corrects_for_it(make_trainer):
    for changes, said in (
        ({"rollout__top_p": 0.9, "rollout__top_k": 5}, True),
        ({"rollout__top_p": 0.9, "loss__rollout_correction": "truncate"}, False),
        ({}, False),
    ):
        trainer, notes = make_trainer(**changes), []
        trainer.reporter.note = notes.append
        trainer._say_what_holds()
        found = [note for note in notes if "loss.rollout_correction=truncate" in note]
        assert bool(found) == said
        assert not said or found[0].startswith("rollout.top_k, rollout.top_p: ")
