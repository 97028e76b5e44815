"""Evaluation on held-out prompts: one set or several, sampled and greedy, as mean scores and pass@k."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from fastppo.config import PPOConfig
from fastppo.data import Row
from fastppo.evaluation_config import BestConfig
from fastppo.rewards import RewardResult
from fastppo.rewards.result import solved_counts
from fastppo.rollout import Rollout, SamplingParams
from fastppo.setting_types import SET_NAME

SEED_OFFSET = 0x5EED
ONLY = ""
"""What the only set of a run that gives it no name is called: its metrics are `eval/...`, those of others `eval/NAME/...`."""

Rows = TypeVar("Rows")
Complete = Callable[[Sequence[Row], SamplingParams], tuple[Rollout, RewardResult, Mapping[str, float]]]
"""(prompts, how to sample) -> (completions of all of them, their scores, what else is measured of them)"""


def load_held_out(
    eval_prompts: Any, load: Callable[[Any, str], Sequence[Row]], config: PPOConfig, max_seed: int
) -> HeldOut | None:
    """What `PPOTrainer` is given as `eval_prompts`; None where that is None. load, and what is raised: as in `named_sets`."""
    sets = named_sets(eval_prompts, "eval_prompts", load, config.evaluation)
    return None if sets is None else HeldOut(sets, config, max_seed)


def named_sets(
    given: Any, argument: str, load: Callable[[Any, str], Rows], config: BestConfig
) -> dict[str, Rows] | None:
    """name -> rows of the held-out sets that a trainer is given, `ONLY` -> rows where it is given one without a name; None where it is given None.

    load: makes rows of what is given in any form; it is told what to call them in errors. Raises what `load` raises; ValueError for a name that
    cannot stand in a metric's, and for settings that need an evaluation where there is none.
    """
    if given is None:
        for name in ("patience", "keep_best"):
            if value := getattr(config, name):
                raise ValueError(f"{argument} is None, expected held-out rows with evaluation.{name} {value}")
        return None
    if not isinstance(given, Mapping):
        return {ONLY: load(given, argument)}
    if not given:
        raise ValueError(f"{argument} is an empty mapping, expected at least one set, or None")
    for name in given:
        if not isinstance(name, str) or not re.fullmatch(SET_NAME, name):
            raise ValueError(
                f"{argument} has a set named {name!r}, expected letters, digits, '_', '.' and '-': it stands in the names of metrics"
            )
    return {name: load(rows, f"{argument}[{name!r}]") for name, rows in given.items()}


def prefix_of(name: str) -> str:
    """What the metrics of a set begin with."""
    return f"eval/{name}/" if name else "eval/"


class HeldOut:
    """Sets of held-out prompts. What is measured on them is a function of the weights and the seed alone.

    Args:
        sets: name -> prompts; `ONLY` -> prompts where there is one without a name.
        config: `evaluation`, `rollout`, `reward.solved_score` and `seed` are read.
        max_seed: seeds are below this.
    """

    def __init__(self, sets: Mapping[str, Sequence[Row]], config: PPOConfig, max_seed: int) -> None:
        self._sets, self._config = dict(sets), config
        self._seed = (config.seed + SEED_OFFSET) % max_seed

    def evaluate(self, complete: Complete, note: Callable[[str], None]) -> dict[str, float]:
        """The metrics of every set; of several, `eval/scores` is the mean of theirs. `note` is told of completions without a valid score."""
        metrics: dict[str, float] = {}
        for name, prompts in self._sets.items():
            metrics |= self._evaluate_set(prefix_of(name), list(prompts), complete, note)
        if ONLY not in self._sets:
            scores = [metrics[f"eval/{name}/scores"] for name in self._sets]
            metrics["eval/scores"] = sum(scores) / len(scores)
        return metrics

    def _evaluate_set(
        self, prefix: str, rows: list[Row], complete: Complete, note: Callable[[str], None]
    ) -> dict[str, float]:
        config = self._config.evaluation
        sampling = dataclasses.replace(
            self._config.rollout.sampling(self._seed), n=config.samples, temperature=config.temperature
        )
        solved_score = self._config.reward.solved_score
        rollout, result, others = complete(rows, sampling)
        _say_failures(prefix, result, note)
        metrics = set_metrics(prefix, rollout, result, config.pass_at_k, solved_score)
        metrics |= {f"{prefix}{name}": value for name, value in others.items()}
        if config.greedy:
            rollout, result, others = complete(rows, dataclasses.replace(sampling, n=1, temperature=0.0))
            _say_failures(f"{prefix}greedy/", result, note)
            first = (1,) if config.pass_at_k else ()
            metrics |= set_metrics(f"{prefix}greedy/", rollout, result, first, solved_score)
            metrics |= {f"{prefix}greedy/{name}": value for name, value in others.items()}
        return metrics


def set_metrics(
    prefix: str, rollout: Rollout, result: RewardResult, ks: Sequence[int], solved_score: float
) -> dict[str, float]:
    """`scores` (the mean of those that are valid), `failures` (how many are not), `mean_length` in tokens, and for each of `ks` `pass@k`: the
    mean over the prompts with at least k completions that have a valid score. NaN where there are none."""
    valid = [score for score in result.scores if not math.isnan(score)]
    metrics = {
        f"{prefix}scores": sum(valid) / len(valid) if valid else math.nan,
        f"{prefix}failures": float(result.failures),
        f"{prefix}mean_length": rollout.num_actions / rollout.num_sequences,
    }
    counts = solved_counts(rollout.prompt_index.tolist(), result.scores, solved_score) if ks else {}
    for k in ks:
        chances = [pass_at_k(seen, solved, k) for solved, seen in counts.values() if seen >= k]
        metrics[f"{prefix}pass@{k}"] = sum(chances) / len(chances) if chances else math.nan
    return metrics


def pass_at_k(samples: int, solved: int, k: int) -> float:
    """How likely at least one of k completions solves a prompt that `solved` of `samples` completions have solved:

        1 - C(samples - solved, k) / C(samples, k)

    which is unbiased (Chen et al. 2021, arXiv:2107.03374, section 2.1); rounded once. Raises ValueError unless
    1 <= k <= samples and 0 <= solved <= samples.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k is {k}, expected from 1 to samples = {samples}")
    if not 0 <= solved <= samples:
        raise ValueError(f"solved is {solved}, expected from 0 to samples = {samples}")
    choices = math.comb(samples, k)
    return (choices - math.comb(samples - solved, k)) / choices


def _say_failures(prefix: str, result: RewardResult, note: Callable[[str], None]) -> None:
    if result.failures:
        count, failures = len(result.scores), result.failures
        others = f"{prefix}scores is the mean of the other {count - failures}"
        note(
            f"held out: {failures} of {count} completions have no valid score; "
            f"{others if failures < count else f'there is no {prefix}scores'}"
        )
