"""Metrics on their way to TensorBoard, Weights & Biases, trackio and MLflow: a small adapter over each official package.

What only shows may fail: a tracker that raises is given up, which is said once, and the run goes on. `metrics.jsonl` has every number anyway.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from itertools import islice
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from fastppo.config import TrackingConfig
from fastppo.run_folder import RunFolder, read_settings


class Start(NamedTuple):
    """What a tracker is told of the run that it is to record."""

    folder: RunFolder
    project: str
    name: str
    settings: Mapping[str, Any]
    """As config.yaml holds them: without secrets."""
    next_step: int
    """The first step that will be logged."""
    known_as: str | None
    """What the tracker called the run before it was resumed."""
    note: Callable[[str], None]


class Tracker(Protocol):
    """Made of a `Start`; raises whatever its package raises."""

    known_as: str | None
    """By which it finds the run again."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    """Event files in `tensorboard/` of the run folder. What was recorded after the step that a resume goes back to is hidden."""

    known_as = None

    def __init__(self, start: Start) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(start.folder.path / "tensorboard", purge_step=start.next_step)
        self._writer.add_text("settings", f"```\n{json.dumps(start.settings, indent=1, default=str)}\n```")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of W&B, with its files in `wandb/` of the run folder. Where its server cannot be reached, or knows no key, an offline run."""

    INIT_TIMEOUT = 30  # seconds; W&B's own 90 are long for a run that can go on without it

    def __init__(self, start: Start) -> None:
        import wandb

        options = {
            "project": start.project,
            "name": start.name,
            "config": dict(start.settings),
            "dir": str(start.folder.path),
            "id": start.known_as,
            "resume": None if start.known_as is None else "allow",
            "settings": wandb.Settings(console="off", init_timeout=self.INIT_TIMEOUT),
        }
        try:
            self._run = wandb.init(**options)
        except Exception as error:
            start.note(
                f"wandb goes offline: {_one_line(error)}; `wandb sync` uploads what is in {start.folder.path / 'wandb'}"
            )
            self._run = wandb.init(**options, mode="offline")
        # Steps as a metric of their own: W&B's counter never goes back, which a resume from a checkpoint does.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self.known_as = self._run.id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run of trackio, in its local store or where its settings say."""

    def __init__(self, start: Start) -> None:
        import trackio

        self._run = trackio.init(
            project=start.project,
            name=start.known_as or f"{start.name}-{secrets.token_hex(3)}",  # a resume finds its run by this name alone
            config=dict(start.settings),
            resume="never" if start.known_as is None else "allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.known_as = self._run.name

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow, on the server or store that `MLFLOW_TRACKING_URI` names."""

    PARAMETERS_AT_ONCE = 100  # MLflow's limits
    LONGEST_VALUE = 6000
    RETRIES = "2"  # instead of 7, which take minutes when no server answers

    def __init__(self, start: Start) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", self.RETRIES)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        if start.known_as is not None:
            self.known_as = self._client.get_run(start.known_as).info.run_id
            self._client.update_run(self.known_as, status="RUNNING")
            return
        self.known_as = self._client.create_run(self._experiment(start.project), run_name=start.name).info.run_id
        settings = (Param(name, str(value)[: self.LONGEST_VALUE]) for name, value in _flat(start.settings))
        while batch := list(islice(settings, self.PARAMETERS_AT_ONCE)):
            self._client.log_batch(self.known_as, params=batch)

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        return self._client.create_experiment(name) if found is None else found.experiment_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        rows = [Metric(re.sub(r"[^\w.:/ -]", "_", name), value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self.known_as, metrics=rows)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self.known_as, "FAILED" if failed else "FINISHED")


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
    "mlflow": MLflow,
}


def check_installed(config: TrackingConfig) -> None:
    """Raises ImportError naming a tracker whose package is not there, before a run begins."""
    for name in config.to:
        if find_spec(name) is None:
            raise ImportError(f"tracking.to has {name!r}, but {name} is not installed: pip install fastppo[{name}]")


class Tracking:
    """The trackers of one run; use it as a context manager around its steps.

    Args:
        next_step: the first step that will be logged. resumed: whether the run goes on from a checkpoint, and the trackers' runs with it.
        note: is told what goes wrong.
    """

    def __init__(
        self,
        config: TrackingConfig,
        folder: RunFolder,
        *,
        next_step: int,
        resumed: bool,
        note: Callable[[str], None],
    ) -> None:
        self._note = note
        self._trackers: dict[str, Tracker] = {}
        if not config.to:
            return
        before = folder.tracker_runs if resumed else {}
        name, settings = config.run_name or folder.path.name, read_settings(folder.path) or {}
        for kind in dict.fromkeys(config.to):
            start = Start(folder, config.project, name, settings, next_step, before.get(kind), note)
            try:
                self._trackers[kind] = TRACKERS[kind](start)
            except Exception as error:
                self._give_up(kind, error)
        now = {kind: tracker.known_as for kind, tracker in self._trackers.items() if tracker.known_as is not None}
        folder.tracker_runs = before | now

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The finite ones among the metrics of a step."""
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        for kind, tracker in list(self._trackers.items()):
            try:
                tracker.log(step, finite)
            except Exception as error:
                self._give_up(kind, error)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for name, tracker in self._trackers.items():
            try:
                tracker.close(failed=error is not None)
            except Exception as fault:
                self._note(f"{name} could not be closed: {_one_line(fault)}")

    def _give_up(self, kind: str, error: Exception) -> None:
        tracker = self._trackers.pop(kind, None)
        if tracker is not None:
            with suppress(Exception):
                tracker.close(failed=True)
        self._note(f"the run goes on without {kind}: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """ "section.key" and value of every setting."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
