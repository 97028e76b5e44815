"""The adaptive KL coefficient holds its target while the policy learns; a fixed one lets the policy go where the reward is."""

from __future__ import annotations

import pytest

from fastppo.run_folder import read_metrics
from tests.trainer.test_learning import PROMPTS, SETTINGS, copies_of_first

TARGET = 3.0  # nats a completion; the reward's best answer is 17 away
STEPS = 60
HOLDING = {"kl_target": TARGET, "kl_horizon": 256}
IN_THE_REWARD = {f"reward__{name}": value for name, value in {"kl_coef": 0.1, **HOLDING}.items()}
IN_THE_LOSS = {f"loss__{name}": value for name, value in {"kl_coef": 1.0, "kl_estimator": "k3+", **HOLDING}.items()}
# Whatever is banned while sampling makes the estimate of the KL another one.
SETTINGS = SETTINGS | {"rollout__min_new_tokens": 0}


def kls(make_trainer, tmp_path, **changes) -> list[float]:
    """KL to the reference of each step, in nats a completion."""
    settings = {"total_steps": STEPS, "rollout__samples_per_prompt": 2, "optimizer__lr": 1e-3}
    make_trainer(
        copies_of_first, prompts=PROMPTS, **SETTINGS | settings | {"optimizer__schedule": "constant"} | changes
    ).train()
    return [row["objective/kl"] for row in read_metrics(tmp_path / "run") if row["step"]]


@pytest.mark.slow
@pytest.mark.parametrize("place", [IN_THE_REWARD, IN_THE_LOSS], ids=["reward", "loss"])
def test_it_holds_its_target(make_trainer, tmp_path, place):
    last = kls(make_trainer, tmp_path, **place)[-20:]
    assert 0.7 * TARGET < sum(last) / len(last) < 1.3 * TARGET
    assert max(last) < 2.5 * TARGET


@pytest.mark.slow
def test_a_fixed_coefficient_lets_it_go(make_trainer, tmp_path):
    assert kls(make_trainer, tmp_path, reward__kl_coef=0.02, total_steps=30)[-1] > 3 * TARGET


@pytest.mark.slow
def test_nothing_moves_at_learning_rate_zero(make_trainer, tmp_path):
    found = kls(make_trainer, tmp_path, optimizer__lr=0.0, critic__lr=0.0, total_steps=4, **IN_THE_REWARD)
    coefficients = [row["objective/kl_coef"] for row in read_metrics(tmp_path / "run") if row["step"]]
    assert found == [0.0] * 4 and coefficients == sorted(coefficients, reverse=True)
