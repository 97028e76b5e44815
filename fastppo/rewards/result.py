"""What the reward functions said of a batch: their weighted sum and each one's own scores, with the invalid ones marked and explained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastppo.rewards.function import NoScore, Scores
from fastppo.rewards.weighted import WeightedReward, normalised

LARGEST_SCORE = 1e12
"""Larger ones, of either sign, are invalid: their squares (a variance, the critic's loss), summed over a batch, may leave fp32."""

_TOO_LARGE = f"more than {LARGEST_SCORE:g} in size, which fp32 cannot train on"


@dataclass(frozen=True)
class RewardResult:
    """What the reward functions said about B completions. NaN is the only mark of an invalid score."""

    scores: list[float]
    """[B] weighted sum of those that apply; NaN where one failed or gave NaN, infinity or more than `LARGEST_SCORE`, or where none applies."""
    by_name: dict[str, list[float]]
    """Each function's own [B] scores; NaN where it is invalid or does not apply."""
    failures: int
    """How many of `scores` are NaN."""
    errors: list[str]
    """One text for each failed attempt (also those that a retry made good) and each function with invalid entries."""

    def select(self, indices: Sequence[int]) -> RewardResult:
        """The completions at `indices`, in that order, with all errors."""
        scores = [self.scores[i] for i in indices]
        by_name = {name: [own[i] for i in indices] for name, own in self.by_name.items()}
        return RewardResult(scores, by_name, sum(map(math.isnan, scores)), self.errors)


@dataclass(frozen=True)
class RewardAnswers:
    """What the reward functions answered for some completions, before anything is made of it."""

    answers: dict[str, Scores | None]
    """Each function's [count] scores, None where it failed."""
    errors: list[str]
    """Of the attempts."""
    count: int

    @classmethod
    def of_shares(cls, shares: Sequence[RewardAnswers], places: Sequence[Sequence[int]]) -> RewardAnswers:
        """Of one batch that was divided. places: of each share, where its completions stand in the batch."""
        count = sum(share.count for share in shares)
        answers: dict[str, Scores | None] = dict.fromkeys(name for share in shares for name in share.answers)
        for name in answers:
            if any(share.answers[name] is not None for share in shares):
                scores: Scores = [None] * count
                for share, own in zip(shares, places, strict=True):
                    failed = [NoScore("the call failed")] * share.count
                    for place, score in zip(own, share.answers[name] or failed, strict=True):
                        scores[place] = score
                answers[name] = scores
        return cls(answers, [error for share in shares for error in share.errors], count)


def combine(given: RewardAnswers, terms: Mapping[str, WeightedReward], normalise: bool) -> RewardResult:
    """The weighted sum of what the functions answered.

    Args:
        terms: each function's weight, and whether it is normalised.
        normalise: False leaves the normalisation out.
    """
    answers, errors, count = given.answers, list(given.errors), given.count
    totals, applies = [0.0] * count, [False] * count
    by_name: dict[str, list[float]] = {}
    for name, scores in answers.items():
        values = [math.nan] * count if scores is None else scores
        errors += _complaints(f"reward {name!r} gave", [] if scores is None else scores)
        by_name[name] = [math.nan if value is None or not _usable(value) else value for value in values]
        term = terms[name]
        addends = normalised(by_name[name]) if normalise and term.normalise else by_name[name]
        for index, value in enumerate(values):
            if value is not None:
                applies[index] = True
                totals[index] += term.weight * addends[index]
    errors += _complaint("no reward applies (each gave None)", [i for i, used in enumerate(applies) if not used], count)
    large = [index for index, total in enumerate(totals) if _too_large(total)]
    errors += _complaint(f"the rewards' sum is {_TOO_LARGE}", large, count)
    scores = [total if used and _usable(total) else math.nan for total, used in zip(totals, applies, strict=True)]
    return RewardResult(scores, by_name, sum(map(math.isnan, scores)), errors)


def solved_counts(prompts: Sequence[int], scores: Sequence[float], solved_score: float) -> dict[int, tuple[int, int]]:
    """prompt -> (completions with at least `solved_score`, completions with a valid score).

    Args:
        prompts: [B] numbers, which prompt a completion is of. scores: [B]; NaN is invalid. They are compared in fp32, as a step keeps them.
    """
    counts: dict[int, tuple[int, int]] = {}
    for prompt, score in zip(prompts, scores, strict=True):
        solved, seen = counts.get(prompt, (0, 0))
        solves = bool(np.float32(score) >= np.float32(solved_score))
        counts[prompt] = (solved + solves, seen + (not math.isnan(score)))
    return counts


def _usable(score: float) -> bool:
    return abs(score) <= LARGEST_SCORE  # NaN is not


def _too_large(score: float) -> bool:
    return math.isfinite(score) and not _usable(score)


def _complaints(who: str, scores: Scores) -> list[str]:
    given = [(index, score) for index, score in enumerate(scores) if score is not None]
    reasons: dict[str, list[int]] = {}
    for index, score in given:
        if not math.isfinite(score):
            what = f"no score ({score.reason})" if isinstance(score, NoScore) else "NaN or infinity"
            reasons.setdefault(what, []).append(index)
    reasons[_TOO_LARGE] = [index for index, score in given if _too_large(score)]
    return [text for what, indices in reasons.items() for text in _complaint(f"{who} {what}", indices, len(scores))]


def _complaint(what: str, indices: list[int], count: int) -> list[str]:
    return (
        [f"{what} for {len(indices)} of {count} completions, the first of them number {indices[0]}"] if indices else []
    )
