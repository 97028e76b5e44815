"""How well a reward model tells the better of two answers, and how well it knows when it does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

BINS = 10


class Bin(NamedTuple):
    """Pairs of about one confidence."""

    confidence: float
    """Their mean probability that the answer with the higher score is the better one."""
    accuracy: float
    """The share of them in which it is."""
    pairs: int


def agreement(margins: Sequence[float]) -> dict[str, float]:
    """Of held-out pairs, whose `margins` are the chosen minus the rejected score (finite, at least one):

    accuracy: the share of pairs with a margin above 0; a margin of 0 counts a half.
    loss: the mean of -log sigmoid(margin), the negative log-likelihood of Bradley and Terry (1952); log 2 = 0.693 is chance.
    mean_margin: the mean.
    calibration_error: expected calibration error (Guo et al. 2017, arXiv:1706.04599, equation 3) over ten bins of confidence from 1/2 to 1.
    """
    count = len(margins)
    error = sum(b.pairs * abs(b.accuracy - b.confidence) for b in calibration_bins(margins)) / count
    return {
        "accuracy": sum(map(_right, margins)) / count,
        "loss": sum(max(-margin, 0.0) + math.log1p(math.exp(-abs(margin))) for margin in margins) / count,
        "mean_margin": math.fsum(margins) / count,
        "calibration_error": error,
    }


def calibration_bins(margins: Sequence[float]) -> list[Bin]:
    """Bins of equal width of the confidence sigmoid(|margin|), which is from 1/2 to 1; empty ones are left out."""
    bins: dict[int, list[float]] = {}
    for margin in margins:
        place = int((_confidence(margin) - 0.5) * 2 * BINS)
        bins.setdefault(min(place, BINS - 1), []).append(margin)
    return [
        Bin(sum(map(_confidence, b)) / len(b), sum(map(_right, b)) / len(b), len(b)) for _, b in sorted(bins.items())
    ]


def looks_swapped(accuracy: float, pairs: int) -> bool:
    """Whether an accuracy is below one half by more than three standard errors of a coin thrown `pairs` times."""
    return accuracy < 0.5 - 1.5 / math.sqrt(pairs)


def plot_calibration(margins: Sequence[float], out: str | Path) -> None:
    """Draw accuracy against confidence, and the margins. Raises ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install fastppo[plot]") from error
    figure = Figure(figsize=(9.2, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    bins, numbers = calibration_bins(margins), agreement(margins)
    left.plot([0.5, 1], [0.5, 1], color="#8d99ae", linestyle="--", label="as often right as it thinks")
    left.plot([b.confidence for b in bins], [b.accuracy for b in bins], color="C0", marker="o", label="held-out pairs")
    for b in bins:
        left.annotate(str(b.pairs), (b.confidence, b.accuracy), textcoords="offset points", xytext=(4, -12), fontsize=8)
    left.set(xlabel="probability of the answer that it prefers", ylabel="share in which that is the chosen one")
    left.set(title=f"Calibration: error {numbers['calibration_error']:.3f}", xlim=(0.48, 1.02), ylim=(-0.02, 1.05))
    left.legend(frameon=False, fontsize="small")
    right.hist(margins, bins=30, color="C0", alpha=0.7)
    right.axvline(0, color="#8d99ae", linestyle="--")
    right.set(xlabel="chosen minus rejected score", ylabel="pairs", title=f"Accuracy {numbers['accuracy']:.3f}")
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.savefig(out, dpi=110)


def _confidence(margin: float) -> float:
    return 1 / (1 + math.exp(-abs(margin)))


def _right(margin: float) -> float:
    return 0.5 if margin == 0 else float(margin > 0)
