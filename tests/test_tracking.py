"""Metrics reach each tracker's official package, a resumed run goes on in the same place, and no tracker can end a run."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastppo import tracking
from fastppo.config import TrackingConfig
from fastppo.run_folder import RunFolder, read_metrics
from fastppo.tracking import TRACKERS, Tracking
from tests.tiny import make_folder, ppo_config

SETTINGS = {"seed": 3, "optimizer": {"lr": 1e-3}, "reward": {"functions": [{"arguments": {}}]}}


def record(folder: RunFolder, kind: str, steps, *, resumed=False, failed=False, **config) -> list[str]:
    """Log steps through one tracker, as a run does; what it noted."""
    notes: list[str] = []
    known = {"next_step": steps[0], "resumed": resumed}
    try:
        with Tracking(TrackingConfig(to=kind, **config), folder, **known, note=notes.append) as trackers:
            for step in steps:
                trackers.log(
                    step, {"objective/scores": step / 4, "rewards/<lambda>/mean": 1.0, "objective/kl": math.nan}
                )
            if failed:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    return notes


def need(package: str):
    return pytest.importorskip(package, reason=f"{package} is not installed (make peers)")


# TensorBoard


def scalars(folder: RunFolder) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder.path / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard(tmp_path):
    """What a resume drops from metrics.jsonl is hidden in TensorBoard too."""
    need("tensorboard")
    folder = make_folder(tmp_path / "run", SETTINGS)
    assert record(folder, "tensorboard", [1, 2, 3]) == []
    assert scalars(folder)["objective/scores"] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert record(folder, "tensorboard", [3, 4], resumed=True) == []
    found = scalars(folder)
    assert [step for step, _ in found["objective/scores"]] == [1, 2, 3, 4] and "objective/kl" not in found


def test_a_run_of_the_trainer_in_tensorboard(make_trainer, tmp_path):
    """Every finite number of metrics.jsonl, also after a resume."""
    need("tensorboard")
    changes = {"tracking__to": ("tensorboard",), "eval_prompts": ["ab"]}
    make_trainer(total_steps=2, **changes).train()
    make_trainer(total_steps=3, **changes).train(resume=True)
    rows, found = read_metrics(tmp_path / "run"), scalars(RunFolder(tmp_path / "run", resume=True))
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for name in {name for row in rows for name in row} - {"step"}:
        written = [row["step"] for row in rows if row.get(name) is not None]
        assert [step for step, _ in found[name]] == written, name


# Weights & Biases


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file, which is a LevelDB log: a header of 7 bytes, then blocks of 32 KiB of chunks that know their length."""
    data, place, record = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        length, kind = struct.unpack_from("<HB", data, place + 4)
        if kind == 0:  # the rest of the block is empty
            place += 2**15 - place % 2**15
            continue
        record += data[place + 7 : place + 7 + length]
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""
        place += 7 + length
        place += left if (left := 2**15 - place % 2**15) < 7 else 0


def wandb_history(folder: RunFolder) -> list[dict[str, float]]:
    """The rows of all offline runs of a folder, as `wandb sync` would send them once W&B's own process has ended."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()
    rows = []
    for path in sorted((folder.path / "wandb").glob("offline-run-*/*.wandb")):
        for data in wandb_records(path):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.history.item:
                items = record.history.item
                rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    return rows


@pytest.fixture
def fresh_wandb(monkeypatch, tmp_path):
    """W&B reads its environment once."""
    wandb = need("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))  # no key of whoever runs the tests
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()
    yield
    wandb.teardown()


def test_wandb_offline(tmp_path, monkeypatch, fresh_wandb):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = make_folder(tmp_path / "run", SETTINGS)
    assert record(folder, "wandb", [1, 2]) == []
    known = folder.tracker_runs["wandb"]
    assert [(row["step"], row["objective/scores"]) for row in wandb_history(folder)] == [(1, 0.25), (2, 0.5)]
    assert record(folder, "wandb", [2, 3], resumed=True) == []
    assert folder.tracker_runs["wandb"] == known, "the same run, which `wandb sync` appends to"
    assert len(list((folder.path / "wandb").glob(f"offline-run-*-{known}"))) == 2


@pytest.mark.parametrize("key", ["0" * 40, None], ids=["no network", "no key"])
def test_wandb_without_a_server_goes_offline(tmp_path, monkeypatch, fresh_wandb, key):
    monkeypatch.setattr(tracking.WeightsAndBiases, "INIT_TIMEOUT", 2)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    folder = make_folder(tmp_path / "run", SETTINGS)
    (note,) = record(folder, "wandb", [1, 2])
    assert note.startswith("wandb goes offline: ") and "\n" not in note and str(folder.path / "wandb") in note
    assert [row["step"] for row in wandb_history(folder)] == [1, 2]


# trackio reads where its store is when it is imported


TRACKIO = """
import json, sys
from tests.test_tracking import RunFolder, record
folder = RunFolder(sys.argv[1], resume=True)
assert record(folder, "trackio", [1, 2], project="ours") == []
first = folder.tracker_runs["trackio"]
assert record(folder, "trackio", [3], project="ours", resumed=True) == []
assert folder.tracker_runs["trackio"] == first
assert record(folder, "trackio", [1], project="ours") == []
import trackio
from trackio.sqlite_storage import SQLiteStorage
names = [run.name for run in trackio.Api().runs("ours")]
scores = {name: [(row["step"], row["objective/scores"]) for row in SQLiteStorage.get_logs("ours", name)] for name in names}
print("FOUND", json.dumps([scores.pop(first), list(scores.values())]))
"""


def test_trackio(tmp_path):
    """A resume goes on in the same run; a new run of the same name is another."""
    need("trackio")
    folder = make_folder(tmp_path / "run", SETTINGS)
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "store")}
    done = subprocess.run(
        [sys.executable, "-c", TRACKIO, str(folder.path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.partition("FOUND ")[2].splitlines()[0])
    assert found == [[[1, 0.25], [2, 0.5], [3, 0.75]], [[[1, 0.25]]]]


# MLflow


@pytest.fixture
def mlflow_store(tmp_path, monkeypatch):
    need("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def test_mlflow(tmp_path, mlflow_store):
    from mlflow import MlflowClient

    folder = make_folder(tmp_path / "run", SETTINGS)
    assert record(folder, "mlflow", [1, 2], project="ours", run_name="mine", failed=True) == []
    known, client = folder.tracker_runs["mlflow"], MlflowClient()
    assert client.get_run(known).info.status == "FAILED"
    assert record(folder, "mlflow", [3], project="ours", resumed=True) == []
    run = client.get_run(known)
    assert run.info.status == "FINISHED" and run.info.run_name == "mine" and run.data.params["optimizer.lr"] == "0.001"
    assert client.get_experiment(run.info.experiment_id).name == "ours"
    history = client.get_metric_history(known, "objective/scores")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert run.data.metrics.keys() == {"objective/scores", "rewards/_lambda_/mean"}, "a name that MLflow takes; no NaN"


def test_mlflow_without_a_server(tmp_path, monkeypatch):
    need("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (note,) = record(make_folder(tmp_path / "run", SETTINGS), "mlflow", [1, 2])
    assert note.startswith("the run goes on without mlflow: ") and "\n" not in note


# All of them


class Stubborn:
    """A tracker that works for a while."""

    known_as = None

    def __init__(self, start):
        self.fails = start.project
        if self.fails == "opening":
            raise OSError("no\nnetwork")

    def log(self, step, metrics):
        if step >= 2 and self.fails == "logging":
            raise RuntimeError("disk full")

    def close(self, failed):
        if self.fails in ("logging", "closing"):
            raise ValueError("gone")


@pytest.mark.parametrize(
    ("fails", "note"),
    [
        ("opening", "the run goes on without tensorboard: no network"),
        ("logging", "the run goes on without tensorboard: disk full"),
        ("closing", "tensorboard could not be closed: gone"),
    ],
)
def test_a_tracker_that_fails_is_said_once_and_ends_no_run(make_trainer, tmp_path, monkeypatch, fails, note):
    monkeypatch.setitem(TRACKERS, "tensorboard", Stubborn)
    monkeypatch.setattr(tracking, "check_installed", lambda config: None)
    monkeypatch.setattr("fastppo.trainer.check_installed", lambda config: None)
    notes: list[str] = []
    trainer = make_trainer(total_steps=4, tracking__to=("tensorboard",), tracking__project=fails)
    trainer.reporter.note = notes.append
    trainer.train()
    assert [text for text in notes if "tensorboard" in text] == [note]
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_package_that_is_missing_is_named_before_the_run(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"tracking.to has 'wandb', .* pip install fastppo\[wandb\]"):
        make_trainer(tracking__to=("wandb",))
    assert not (tmp_path / "run").exists()


def test_settings():
    assert ppo_config(tracking__to="wandb").tracking.to == ("wandb",)
    assert ppo_config().tracking.to == ()
    for wrong in ({"to": ["tensorbord"]}, {"project": ""}):
        with pytest.raises(ValueError, match="tensorbord|at least 1"):
            TrackingConfig(**wrong)


def test_no_secret_reaches_a_tracker(tmp_path, monkeypatch):
    """They are given what config.yaml holds."""
    seen = []

    class Listening(Stubborn):
        def __init__(self, start):
            seen.append(json.dumps(start.settings))
            self.fails = None

    monkeypatch.setitem(TRACKERS, "tensorboard", Listening)
    with pytest.warns(UserWarning, match="secret"):
        folder = make_folder(tmp_path / "run", {"reward": {"functions": [{"arguments": {"api_key": "sk-0123456789"}}]}})
    record(folder, "tensorboard", [1])
    assert "${env:API_KEY}" in seen[0] and "sk-" not in seen[0]


def test_damaged_ids_start_new_tracker_runs(tmp_path):
    folder = make_folder(tmp_path / "run", SETTINGS)
    for text in ("", "[]", "{"):
        (folder.path / "tracking.json").write_text(text)
        assert folder.tracker_runs == {}
    folder.tracker_runs = {"wandb": "abc"}
    assert folder.tracker_runs == {"wandb": "abc"}
    make_folder(tmp_path / "run", SETTINGS)
    assert folder.tracker_runs == {}, "a run that starts is a new one everywhere"
