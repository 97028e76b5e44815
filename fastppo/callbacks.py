"""Code of the user's own that a run calls between its steps."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastppo.run_loop import RunLoop


class Callback:
    """What a run calls between its steps: `PPOTrainer(..., callbacks=[MyCallback()])`, and `SFTTrainer` likewise. Override what is
    needed.

    `trainer.step` is the number of steps that are done; `trainer.stop(reason)` ends the run after the step in hand, as its last step would.
    Metrics are those that `metrics.jsonl` has got already; changing them changes nothing. What a callback raises ends the run, and the steps
    that are done are saved.
    """

    def on_begin(self, trainer: RunLoop) -> None:
        """`train` begins, or goes on from a checkpoint."""

    def on_evaluation(self, trainer: RunLoop, metrics: dict[str, float]) -> None:
        """The held-out prompts or examples were evaluated: before the first step (`trainer.step` is 0), and as `evaluation.every` says."""

    def on_step(self, trainer: RunLoop, metrics: dict[str, float]) -> None:
        """A step is done; its metrics, with those of its evaluation where it had one."""

    def on_checkpoint(self, trainer: RunLoop, path: Path) -> None:
        """A checkpoint was written to this folder."""

    def on_end(self, trainer: RunLoop, metrics: dict[str, float]) -> None:
        """The run is over and its model written; what `train` will return. Not called where an error or a signal ends it."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know, as plain JSON: it is saved with every checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Called before `on_begin` with what `state_dict` returned, where a run goes on from a checkpoint that has it."""


EVENTS = [name for name in vars(Callback) if name.startswith("on_")]


class Callbacks:
    """Calls several, one after another. A checkpoint knows them by the names of their classes; the second `Log` is `Log_2`.

    Raises TypeError for what is no `Callback`, ValueError for one with a method `on_...` that nothing calls.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        if not isinstance(callbacks, list | tuple):
            raise TypeError(f"callbacks is {type(callbacks).__name__}, expected a list of fastppo.Callback")
        self._named: dict[str, Callback] = {}
        for index, callback in enumerate(callbacks):
            _check(callback, f"callbacks[{index}]")
            kind = type(callback).__name__
            count = sum(type(other).__name__ == kind for other in self._named.values())
            self._named[kind if count == 0 else f"{kind}_{count + 1}"] = callback

    def call(self, event: str, trainer: RunLoop, *arguments: Any) -> None:
        for callback in self._named.values():
            own = [dict(argument) if isinstance(argument, dict) else argument for argument in arguments]
            getattr(callback, event)(trainer, *own)

    def hear_of(self, event: str) -> bool:
        """Whether any does something then."""
        return any(getattr(type(each), event) is not getattr(Callback, event) for each in self._named.values())

    def state_dict(self) -> dict[str, Any]:
        return {name: callback.state_dict() for name, callback in self._named.items()}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Those that the state does not name stay as they are."""
        for name, callback in self._named.items():
            if state and name in state:
                callback.load_state_dict(state[name])


def _check(callback: Any, name: str) -> None:
    if not isinstance(callback, Callback):
        what = f"the class {callback.__name__}" if isinstance(callback, type) else type(callback).__name__
        raise TypeError(f"{name} is {what}, expected an object of a class derived from fastppo.Callback")
    for method in dir(callback):
        if method.startswith("on_") and method not in EVENTS:
            near = difflib.get_close_matches(method, EVENTS, n=1, cutoff=0.0)[0]
            raise ValueError(f"{name} has a method {method}, which nothing calls; the nearest is {near}")
