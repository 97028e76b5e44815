"""The numbers that a reward model is judged by, against their definitions in torch, and the picture of them."""

from __future__ import annotations

import math

import pytest
import torch

from fastppo.calibration import agreement, calibration_bins, looks_swapped, plot_calibration


def test_numbers_by_their_definitions():
    margins = torch.linspace(-3, 5, 41, dtype=torch.float64)
    found = agreement(margins.tolist())
    right = (margins > 0).double() + 0.5 * (margins == 0)
    confidence = margins.abs().sigmoid()
    place = ((confidence - 0.5) * 20).long().clamp(max=9)
    gaps = [(right[place == b] - confidence[place == b]).sum().abs() for b in range(10)]
    expected = {
        "accuracy": right.mean(),
        "loss": -torch.nn.functional.logsigmoid(margins).mean(),
        "mean_margin": margins.mean(),
        "calibration_error": sum(gaps) / 41,
    }
    assert found == pytest.approx({name: float(value) for name, value in expected.items()})


def test_the_extremes():
    perfect = agreement([800.0, 1000.0])
    assert perfect == {"accuracy": 1.0, "loss": 0.0, "mean_margin": 900.0, "calibration_error": 0.0}
    assert agreement([-1000.0])["loss"] == 1000.0 and agreement([-1000.0])["calibration_error"] == 1.0
    undecided = agreement([0.0] * 4)
    assert undecided["accuracy"] == 0.5 and undecided["loss"] == pytest.approx(math.log(2))
    assert undecided["calibration_error"] == 0.0, "it says one half"


def test_bins_hold_every_pair_once():
    bins = calibration_bins([0.0, 0.1, -0.1, 3.0, -9.0])
    assert [b.pairs for b in bins] == [3, 2] and [b.accuracy for b in bins] == [0.5, 0.5]
    assert all(0.5 <= b.confidence <= 1 for b in bins)


@pytest.mark.parametrize(("accuracy", "pairs", "swapped"), [(0.4, 100, False), (0.34, 100, True), (0.0, 4, False)])
def test_what_looks_swapped(accuracy, pairs, swapped):
    """Three standard errors below one half: 0.35 of 100 pairs; of four pairs nothing can be said."""
    assert looks_swapped(accuracy, pairs) is swapped


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    plot_calibration([0.1, -0.2, 2.0, 3.0], tmp_path / "calibration.png")
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")
