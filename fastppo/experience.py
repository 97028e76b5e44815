"""What a step learns from: completions and their scores; sampled again until enough of them have something to teach ("dynamic sampling")."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fastppo.errors import TrainingError
from fastppo.rewards.scores import Scores
from fastppo.rollout.rollout import Rollout


class Experience(NamedTuple):
    rollout: Rollout
    """The samples that have a valid score."""
    scores: Scores
    """Theirs."""
    all_scores: Scores
    """Of every sample, also those that are left out; not of what a search put together."""
    prompts: int
    """How many were sampled for."""
    tokens: int
    """How many were sampled, also for what is left out."""
    samples: list[dict[str, Any]]
    """Those that are written down."""
    described: list[dict[str, Any] | None]
    """Of each sequence of the rollout the one of `samples` that it is."""
    metrics: dict[str, float]
    """What the sampler says of itself; of several rounds, of the last one."""


def sample_with_signal(sample: Callable[[int], Experience], *, groups: int, max_rounds: int) -> Experience:
    """Of `groups` prompts whose samples' scores differ (DAPO, arXiv:2503.14476, section 3.2).

    `sample(round)` is called until there are enough of them, `max_rounds` times at most; then fewer have to do. Raises TrainingError where there
    is none: scores that are all the same give no advantage.
    """
    rounds: list[Experience] = []
    found: list[list[int]] = []
    while len(found) < groups and len(rounds) < max_rounds:
        rounds.append(sample(len(rounds)))
        found = groups_with_signal(everything := joined(rounds))
    if not found:
        raise TrainingError(
            f"the samples of each prompt have one and the same score in all {len(rounds)} rounds of rollout.max_sampling_rounds: "
            f"there is nothing to learn from; prompts that are neither too easy nor too hard, or more rollout.samples_per_prompt, would have it"
        )
    kept = [index for group in found[:groups] for index in group]
    metrics = {"rollout/sampling_rounds": float(len(rounds)), "rollout/signal_rate": len(found) / everything.prompts}
    rollout, scores = everything.rollout.select(kept), everything.scores.select(kept)
    described = [everything.described[index] for index in kept]
    metrics = everything.metrics | metrics
    return everything._replace(rollout=rollout, scores=scores, described=described, metrics=metrics)


def groups_with_signal(experience: Experience) -> list[list[int]]:
    """The samples of each prompt whose scores are not all the same."""
    members: dict[int, list[int]] = {}
    for index, prompt in enumerate(experience.rollout.prompt_index.tolist()):
        members.setdefault(prompt, []).append(index)
    values = experience.scores.values.tolist()
    return [group for group in members.values() if len({values[index] for index in group}) > 1]


def joined(rounds: list[Experience]) -> Experience:
    """One after another; no prompt of a round is one of another's."""
    if len(rounds) == 1:
        return rounds[0]
    prompts = [one.prompts for one in rounds]
    return Experience(
        Rollout.joined([one.rollout for one in rounds], prompts),
        Scores.joined([one.scores for one in rounds]),
        Scores.joined([one.all_scores for one in rounds]),
        sum(prompts),
        sum(one.tokens for one in rounds),
        [sample for one in rounds for sample in one.samples],
        [sample for one in rounds for sample in one.described],
        rounds[-1].metrics,
    )
