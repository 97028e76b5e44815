"""Coefficients that follow a target."""

from __future__ import annotations

import pytest

from fastppo.algorithms.controllers import EntropyController, KLController, restore, states


def test_kl_coefficient():
    """A fifth at most for `horizon` completions, in proportion for fewer, and never below 0."""
    controller = KLController(0.1, target=2.0, horizon=100)
    controller.update(kl=2.2, completions=50)
    assert controller.coef == pytest.approx(0.1 * (1 + 0.1 * 0.5))
    controller.coef = 0.1
    controller.update(kl=9.0, completions=50)
    assert controller.coef == pytest.approx(0.1 * (1 + 0.2 * 0.5))
    controller.coef = 0.1
    controller.update(kl=-1.0, completions=100_000)
    assert controller.coef == pytest.approx(0.1 * 0.8)


def test_entropy_coefficient():
    controller = EntropyController(0.0, target=0.5, step=0.01)
    for entropy, coef, inner in ((0.4, 0.01, 0.01), (0.3, 0.02, 0.02), (0.6, 0.0, 0.01), (0.4, 0.02, 0.02)):
        controller.update(entropy)
        assert (controller.coef, controller.inner) == (pytest.approx(coef), pytest.approx(inner))
    for _ in range(3):
        controller.update(0.6)
    assert controller.inner == 0


def make(kl_target=None, entropy_target=None) -> dict:
    return {"kl": KLController(0.1, kl_target, 10), "entropy": EntropyController(0.0, entropy_target, 0.01)}


def test_only_what_moves_is_saved_and_restored():
    """A fixed coefficient is the config's, also where it moved when the checkpoint was written."""
    controllers = make(kl_target=1.0, entropy_target=0.5)
    controllers["kl"].update(3.0, 10)
    controllers["entropy"].update(0.6)
    saved = states(controllers)
    assert states(make()) == {}
    again, fixed = make(kl_target=1.0, entropy_target=0.5), make()
    restore(again, saved)
    restore(fixed, saved)
    assert again == controllers and fixed == make()
