"""Which step of a run was evaluated as its best, and for how many evaluations there was nothing better."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastppo.checkpoint import list_checkpoints, load_checkpoint
from fastppo.errors import CheckpointError
from fastppo.evaluation_config import BestConfig
from fastppo.run_folder import BEST, RunFolder

SMALLER_IS_BETTER = ("failures", "mean_length", "nll", "perplexity")
"""Metrics whose names end so are to become small where `evaluation.goal` does not say otherwise."""


class Best:
    """The best evaluation so far by one of its metrics. A value that is no number is never an improvement.

    Args:
        config: `metric`, `goal`, `patience`, `min_improvement` and `keep_best` are read.
    """

    def __init__(self, config: BestConfig) -> None:
        self._metric, self._patience, self._least = config.metric, config.patience, config.min_improvement
        goal = config.goal or ("min" if config.metric.endswith(SMALLER_IS_BETTER) else "max")
        self._sign, self._keep = (1 if goal == "max" else -1), config.keep_best
        self.load_state_dict(None)

    @property
    def spared(self) -> set[int]:
        """Steps whose checkpoints stay when others are removed."""
        return {self.step} if self._keep and self.step is not None else set()

    @property
    def stopped(self) -> str | None:
        """Why the run ends here, in a sentence; None where it goes on."""
        if self._patience is None or self._waited < self._patience:
            return None
        best = "was never a number" if self.step is None else f"was best after step {self.step}, {self.value:.6g}"
        count = f"{self._waited} evaluation{'s' * (self._waited != 1)}"
        return f"{count} in a row without an improvement: {self._metric} {best}"

    def check(self, metrics: Mapping[str, float]) -> None:
        """Raises ValueError where an evaluation has no such metric."""
        if self._metric not in metrics:
            near = difflib.get_close_matches(self._metric, metrics, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"evaluation.metric is {self._metric!r}, which no evaluation of this run has; the nearest is {near}"
            )

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in the evaluation after `step`."""
        value = metrics[self._metric]
        if math.isfinite(value) and (self.value is None or self._gain(value, self.value) > 0):
            self.step, self.value = step, value
        if math.isfinite(value) and (self._mark is None or self._gain(value, self._mark) > self._least):
            self._mark, self._waited = value, 0
        else:
            self._waited += 1

    def _gain(self, value: float, before: float) -> float:
        return self._sign * (value - before)

    def forget(self) -> None:
        """The best is chosen anew; what there is to improve on stays."""
        self.step = self.value = None

    def write(self, policy: nn.Module, save: Callable[[Path], None], folder: RunFolder) -> None:
        """Have `save` write the model with the policy of the best step to `best` in the run folder, where its checkpoint is kept; then the
        policy is again what it was."""
        for step in self.spared:
            if (checkpoint := list_checkpoints(folder.checkpoints).get(step)) is None:
                raise CheckpointError(f"the checkpoint of the best step, {step}, has been removed")
            tensors, _, _ = load_checkpoint(checkpoint)
            last = {name: value.to("cpu", copy=True) for name, value in policy.state_dict().items()}
            try:
                policy.load_state_dict(tensors["policy"])
                save(folder.path / BEST)
            finally:
                policy.load_state_dict(last)

    def state_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        rule = {"metric": self._metric, "sign": self._sign}
        return rule | {"step": self.step, "value": self.value, "mark": self._mark, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from `state`; begin anew where there is none, or it is of another metric or goal."""
        if state is None or (state["metric"], state["sign"]) != (self._metric, self._sign):
            state = {"step": None, "value": None, "mark": None, "waited": 0}
        self.step: int | None = state["step"]
        self.value: float | None = state["value"]
        self._mark: float | None = state["mark"]
        self._waited: int = state["waited"]
