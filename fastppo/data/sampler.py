"""The order in which prompts are drawn: reproducible, and the same again after a resume."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastppo.data.difficulty import DifficultyPools
from fastppo.rewards.result import solved_counts


class PromptSampler:
    """Draws batches of indices into a data set: all of them once, in random order, then all again in another one.

    The order depends on the seed and the epoch only. A batch runs over an epoch's end into the next one, so every batch is full, unless fewer
    are asked for.

    pools: whose prompts come less often; those that are passed over have no place in their epoch's order.
    """

    def __init__(self, dataset_len: int, batch: int, seed: int, pools: DifficultyPools | None = None) -> None:
        for name, value, least in (("dataset_len", dataset_len, 1), ("batch", batch, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}, expected an integer >= {least}")
        self._dataset_len, self._batch, self._seed = dataset_len, batch, seed
        self._epoch = self._cursor = 0
        self._order = self._shuffled()
        self.pools = pools
        self._drawn: list[int] = []

    def next(self, count: int | None = None) -> list[int]:
        """The next `count` indices, by default `batch`."""
        count, indices = self._batch if count is None else count, []
        while len(indices) < count:
            if self._cursor == self._dataset_len:
                self._epoch, self._cursor = self._epoch + 1, 0
                self._order = self._shuffled()
            taken = self._order[self._cursor : self._cursor + count - len(indices)]
            indices += [index for index in taken if self._comes(index)]
            self._cursor += len(taken)
        self._drawn = indices
        return indices

    def saw(self, places: Tensor, scores: Tensor, solved_score: float) -> dict[str, float]:
        """Tell the pools of the completions of the batch that was drawn last, and return their metrics; none where there are no pools.

        Args:
            places: int64 [B], which prompt of the batch a completion is of. scores: fp32 [B]; NaN is invalid.
        """
        if self.pools is None:
            return {}
        for place, (solved, seen) in solved_counts(places.tolist(), scores.tolist(), solved_score).items():
            self.pools.saw(self._drawn[place], solved, seen)
        return self.pools.metrics()

    def _comes(self, index: int) -> bool:
        return self.pools is None or self.pools.comes(index, f"{self._seed}:{self._epoch}:{index}")

    def state_dict(self) -> dict[str, Any]:
        """Where the sampler stands, as plain JSON."""
        place = {"epoch": self._epoch, "cursor": self._cursor, "dataset_len": self._dataset_len, "seed": self._seed}
        return place if self.pools is None else place | {"pools": self.pools.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, also with another batch size. ValueError where it belongs to another data set or seed."""
        for name, mine in (("dataset_len", self._dataset_len), ("seed", self._seed)):
            if state[name] != mine:
                raise ValueError(f"the saved prompt order has {name} {state[name]}, expected {mine} as in this run")
        self._epoch, self._cursor = int(state["epoch"]), int(state["cursor"])
        if self.pools is not None:
            self.pools.load_state_dict(state.get("pools", {}))
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        order = list(range(self._dataset_len))
        random.Random(f"{self._seed}:{self._epoch}").shuffle(order)
        return order
