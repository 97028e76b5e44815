"""How often prompts are solved, and the pools that this puts them in."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

from fastppo.evaluation_config import DifficultyConfig

EASY, MID, HARD, UNKNOWN = "easy", "mid", "hard", "unknown"


class DifficultyPools:
    """The solve rate of every prompt over its latest completions, and the pool that it is in by that.

    `easy` and `hard` as `DifficultyConfig` draws the line, `mid` between them, `unknown` before there are enough completions.

    Args:
        prompts: how many there are.
    """

    def __init__(self, config: DifficultyConfig, prompts: int) -> None:
        self._config, self._prompts = config, prompts
        self._weights = {EASY: config.easy_weight, HARD: config.hard_weight}
        self._visits: dict[int, tuple[tuple[int, int], ...]] = {}
        self._sizes: Counter[str] = Counter()

    @classmethod
    def of(cls, config: DifficultyConfig, prompts: int, *, normalised: bool) -> DifficultyPools | None:
        """None where every prompt comes as often as any. Raises ValueError where scores are `normalised`: they would say nothing of a prompt
        by itself."""
        if config.easy_weight == config.hard_weight == 1:
            return None
        if normalised:
            raise ValueError(
                "difficulty.easy_weight or hard_weight is below 1, expected 1 with a reward that is normalised: its scores depend on the "
                "others of a step, and do not say whether a prompt is solved"
            )
        return cls(config, prompts)

    def saw(self, prompt: int, solved: int, seen: int) -> None:
        """`solved` of `seen` completions of a prompt have solved it."""
        if not seen:
            return
        self._sizes[self.pool(prompt)] -= prompt in self._visits
        visits = (*self._visits.get(prompt, ()), (solved, seen))
        while sum(count for _, count in visits[1:]) >= self._config.min_samples:
            visits = visits[1:]
        self._visits[prompt] = visits
        self._sizes[self.pool(prompt)] += 1

    def solve_rate(self, prompt: int) -> float | None:
        """Over the latest completions; None before there are `min_samples`."""
        solved, seen = (sum(column) for column in zip((0, 0), *self._visits.get(prompt, ()), strict=True))
        return solved / seen if seen >= self._config.min_samples else None

    def pool(self, prompt: int) -> str:
        rate = self.solve_rate(prompt)
        if rate is None:
            return UNKNOWN
        if rate >= self._config.easy_rate:
            return EASY
        return HARD if rate <= self._config.hard_rate else MID

    def comes(self, prompt: int, seed: str) -> bool:
        """Whether a prompt is drawn where its turn has come: in `easy_weight` or `hard_weight` of the cases, by lot; `seed` decides it."""
        weight = self._weights.get(self.pool(prompt), 1.0)
        return weight >= 1 or random.Random(seed).random() < weight

    def metrics(self) -> dict[str, float]:
        """Which share of all prompts is in which pool."""
        shares = {pool: self._sizes[pool] / self._prompts for pool in (EASY, MID, HARD)}
        return {f"difficulty/{pool}": share for pool, share in shares.items()}

    def state_dict(self) -> dict[str, Any]:
        """prompt -> [[solved, seen], ...] of its latest steps, as plain JSON; nothing that is seen later changes it."""
        return {str(prompt): visits for prompt, visits in self._visits.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, also with other settings."""
        self._visits = {int(prompt): tuple(map(tuple, visits)) for prompt, visits in state.items()}
        self._sizes = Counter(map(self.pool, self._visits))
