"""The order in which prompts are drawn: reproducible, and the same again after a resume."""

from __future__ import annotations

import random
from collections.abc import Mapping


class PromptSampler:
    """Draws batches of indices into a data set: all of them once, in random order, then all again in another one.

    The order depends on the seed and the epoch only. A batch runs over an epoch's end into the next one, so every batch is full, unless fewer
    are asked for.
    """

    def __init__(self, dataset_len: int, batch: int, seed: int) -> None:
        for name, value, least in (("dataset_len", dataset_len, 1), ("batch", batch, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}, expected an integer >= {least}")
        self._dataset_len, self._batch, self._seed = dataset_len, batch, seed
        self._epoch = self._cursor = 0
        self._order = self._shuffled()

    def next(self, count: int | None = None) -> list[int]:
        """The next `count` indices, by default `batch`."""
        count, indices = self._batch if count is None else count, []
        while len(indices) < count:
            if self._cursor == self._dataset_len:
                self._epoch, self._cursor = self._epoch + 1, 0
                self._order = self._shuffled()
            taken = self._order[self._cursor : self._cursor + count - len(indices)]
            indices += taken
            self._cursor += len(taken)
        return indices

    def state_dict(self) -> dict[str, int]:
        """Where the sampler stands, as plain JSON."""
        return {"epoch": self._epoch, "cursor": self._cursor, "dataset_len": self._dataset_len, "seed": self._seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from `state`, also with another batch size. ValueError where it belongs to another data set or seed."""
        for name, mine in (("dataset_len", self._dataset_len), ("seed", self._seed)):
            if state[name] != mine:
                raise ValueError(f"the saved prompt order has {name} {state[name]}, expected {mine} as in this run")
        self._epoch, self._cursor = int(state["epoch"]), int(state["cursor"])
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        order = list(range(self._dataset_len))
        random.Random(f"{self._seed}:{self._epoch}").shuffle(order)
        return order
