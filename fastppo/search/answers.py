"""What every search is given and gives, and the two that sample whole answers: best-of-n and majority vote."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from fastppo.model.decoding import decode
from fastppo.rollout.engine import Engine
from fastppo.rollout.rollout import FinishReason
from fastppo.rollout.sampling import SamplingParams
from fastppo.rollout.stopping import StopStrings, stop_ids

Values = Callable[[list[list[int]]], Sequence[float]]
"""Token ids of n states, each prompt and answer so far -> [n] values, each of the state after the last token."""

Score = Callable[[list[int], list[list[int]]], Sequence[float]]
"""For n finished answers, [n] numbers of their prompts and [n] completions -> [n] scores."""


@dataclass(frozen=True)
class Found:
    """The answer to one prompt."""

    completion: list[int]
    """Token ids, end-of-sequence included."""
    score: float
    """What it was chosen by: its score, its share of the votes, or the value that the critic gave it."""
    finish_reason: FinishReason
    new_tokens: int
    """All that were spent on this prompt: sampled, or looked at as the next one."""


class Endings:
    """What ends an answer, for searches that put it together themselves."""

    def __init__(self, engine: Engine, sampling: SamplingParams) -> None:
        self._ids = frozenset(stop_ids(engine.model, engine.tokenizer, sampling))
        strings = sampling.stop_strings
        if strings and engine.tokenizer is None:
            raise ValueError("sampling.stop_strings needs a tokenizer: Engine(model, tokenizer)")
        self._strings = StopStrings(engine.tokenizer, strings) if strings else None

    def reached(self, completion: list[int]) -> bool:
        """Whether its last token ends it."""
        if completion[-1] in self._ids:
            return True
        return self._strings is not None and self._strings.completed_by_last(completion)


def best_of_n(engine: Engine, prompts: Any, sampling: SamplingParams, score: Score) -> list[Found]:
    """Of `sampling.n` answers to each prompt the one with the highest score, the first of several.

    prompts: as `Engine.generate` takes them. Raises as it does, and ValueError for scores that are not one finite number an answer.
    """
    numbers, completions, reasons = _sample(engine, prompts, sampling)
    return _choose(completions, reasons, asked_scores(score, numbers, completions), sampling.n)


def majority_vote(
    engine: Engine, prompts: Any, sampling: SamplingParams, answer: Callable[[str], Hashable | None]
) -> list[Found]:
    """Of `sampling.n` answers to each prompt the first that says what most say (self-consistency, Wang et al. 2022, arXiv:2203.11171).

    answer: what a completion's text, without special tokens, says; None where it says nothing, which is no vote. Where several have most votes,
    the one that was given first. `Found.score` is the share of all n; 0 where none says anything. Raises as `Engine.generate`.
    """
    if engine.tokenizer is None:
        raise ValueError("a majority vote reads texts, which needs a tokenizer: Engine(model, tokenizer)")
    _, completions, reasons = _sample(engine, prompts, sampling)
    said = [answer(decode(engine.tokenizer, tokens, skip_special_tokens=True)) for tokens in completions]
    n, shares = sampling.n, []
    for first in range(0, len(said), n):
        shares += [votes / n for votes in votes_for(said[first : first + n])]
    return _choose(completions, reasons, shares, n)


def votes_for(said: Sequence[Hashable | None]) -> list[int]:
    """Of answers to one prompt, how many say what each says; 0 for one that says nothing."""
    votes = Counter(said)
    return [0 if what is None else votes[what] for what in said]


def last_match(pattern: str) -> Callable[[str], str | None]:
    """What a completion's text says by a regular expression: its last match, or the first group of that where the expression has one."""
    expression = re.compile(pattern)

    def said(text: str) -> str | None:
        *_, last = [None, *expression.finditer(text)]
        return last and last[min(1, expression.groups)]

    return said


def value_score(values: Values, prompts: list[list[int]]) -> Score:
    """A critic as the judge of finished answers: the value of the state before the last token. What a critic says of the state after it was
    never learned, since nothing follows there."""

    def score(numbers: list[int], completions: list[list[int]]) -> Sequence[float]:
        return values([prompts[i] + tokens[:-1] for i, tokens in zip(numbers, completions, strict=True)])

    return score


def asked_values(values: Values, states: list[list[int]]) -> list[float]:
    """[n] of n states. Raises ValueError where they are not n finite numbers."""
    return _numbers("values", values(states), len(states)) if states else []


def asked_scores(score: Score, numbers: list[int], completions: list[list[int]]) -> list[float]:
    """[n] of n answers. Raises ValueError where they are not n finite numbers."""
    return _numbers("score", score(numbers, completions), len(numbers)) if numbers else []


def _numbers(name: str, found: Sequence[float], expected: int) -> list[float]:
    numbers = [float(number) for number in found]
    if len(numbers) != expected:
        raise ValueError(f"{name} returned {len(numbers)} numbers, expected {expected}")
    for i, number in enumerate(numbers):
        if not math.isfinite(number):
            raise ValueError(f"{name} returned {number} in place {i}, expected a finite number")
    return numbers


def one_answer(sampling: SamplingParams) -> SamplingParams:
    """Raises ValueError for settings that a search which puts answers together has no use for."""
    for name, expected in (("n", 1), ("min_new_tokens", 0)):
        if getattr(sampling, name) != expected:
            raise ValueError(f"sampling.{name} is {getattr(sampling, name)}, expected {expected} in a search")
    return sampling


def _sample(
    engine: Engine, prompts: Any, sampling: SamplingParams
) -> tuple[list[int], list[list[int]], list[FinishReason]]:
    """(numbers of their prompts, completions, why they ended), `sampling.n` for each prompt."""
    rollout = engine.generate(prompts, sampling)
    reasons = [FinishReason(reason) for reason in rollout.finish_reasons.tolist()]
    return rollout.prompt_index.tolist(), rollout.completions(), reasons


def _choose(completions: list[list[int]], reasons: list[FinishReason], scores: list[float], n: int) -> list[Found]:
    """The best of each n, the first where several are."""
    found = []
    for first in range(0, len(scores), n):
        places = range(first, first + n)
        best = max(places, key=scores.__getitem__)
        spent = sum(len(completions[place]) for place in places)
        found.append(Found(completions[best], scores[best], reasons[best], spent))
    return found
