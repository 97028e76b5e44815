"""A reward function with its weight in the sum."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ROUNDING = 1e-6  # of the largest score: a spread below it is fp32's, not the completions'


@dataclass(frozen=True)
class WeightedReward:
    """One term of the sum that is maximised: `PPOTrainer(reward=[bleu, WeightedReward(repetition, weight=0.5)])`.

    Raises ValueError, TypeError: an argument that is not as below.
    """

    function: Callable[..., Any]
    """`fn(prompts, completions, **columns) -> list[float | None]`."""
    weight: float = 1.0
    """Finite and not 0; the score is multiplied by it."""
    normalise: bool = False
    """Subtract the mean of the step's valid scores of this function, and divide by their standard deviation, before the weight is applied (the
    normalise-then-sum of GDPO, arXiv:2601.05242, over the whole step instead of a prompt's group). Where they do not vary all are 0."""

    def __post_init__(self) -> None:
        weight = self.weight
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
            raise TypeError(f"weight is {weight!r}, expected a number")
        if not math.isfinite(weight) or weight == 0:
            raise ValueError(f"weight is {weight!r}, expected a finite number other than 0 (leave the function out)")
        if not isinstance(self.normalise, bool):
            raise TypeError(f"normalise is {self.normalise!r}, expected True or False")


def normalised(scores: list[float]) -> list[float]:
    """(score - mean) / standard deviation over the scores that are not NaN; 0 where these do not vary beyond rounding. NaN stays."""
    valid = [score for score in scores if not math.isnan(score)]
    if not valid:
        return scores
    mean = math.fsum(valid) / len(valid)
    deviation = math.sqrt(math.fsum((score - mean) ** 2 for score in valid) / len(valid))
    if deviation <= ROUNDING * max(map(abs, valid)):
        return [score if math.isnan(score) else 0.0 for score in scores]
    return [(score - mean) / deviation for score in scores]
