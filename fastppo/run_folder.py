"""A run's folder: resolved settings, one line of metrics a step, samples, curves, checkpoints.

config.yaml  metrics.jsonl  samples.jsonl  curve.png  checkpoints/  model/
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

CONFIG, METRICS, SAMPLES = "config.yaml", "metrics.jsonl", "samples.jsonl"


class RunFolder:
    """Creates or reopens the folder of a run.

    Raises ValueError when `path` holds something else, or a run that `resume` did not ask to continue.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], *, resume: bool = False) -> None:
        self.path = Path(path)
        _check_usable(self.path, resume)
        self.path.mkdir(parents=True, exist_ok=True)
        _write_whole(self.path / CONFIG, yaml.safe_dump(_plain(settings), sort_keys=False, allow_unicode=True))

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line; a number that is not finite becomes null, which every JSON reader takes."""
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._append(METRICS, {"step": step, **row})

    def log_sample(self, step: int, prompt: Any, completion: str, score: float) -> None:
        sample = {
            "step": step,
            "prompt": prompt,
            "completion": completion,
            "score": score if math.isfinite(score) else None,
        }
        self._append(SAMPLES, sample)

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        with (self.path / name).open("a") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def rewind(self, step: int) -> None:
        """Drop what was recorded after checkpoint `step` (-1: everything), and a line that a kill cut off."""
        for path in (self.path / METRICS, self.path / SAMPLES):
            if path.exists():
                kept = [row for row in _read_lines(path) if row["step"] <= step]
                _write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, in order. Raises FileNotFoundError when `path` is no run folder."""
    file = Path(path) / METRICS
    if not file.exists():
        raise FileNotFoundError(f"{path} is no run folder: it has no {METRICS}")
    return _read_lines(file)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file; a torn last line, which a kill can leave, is passed over."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def _check_usable(path: Path, resume: bool) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"output_dir is {str(path)!r}, which is a file, expected a folder")
    content = {entry.name for entry in path.iterdir()} if path.exists() else set()
    if content and CONFIG not in content:
        raise ValueError(f"output_dir is {str(path)!r}, which holds other files; choose an empty or new folder")
    if METRICS in content and not resume:
        raise ValueError(
            f"output_dir {str(path)!r} holds a run already: resume it (--resume), or choose another output_dir"
        )


def _write_whole(path: Path, text: str) -> None:
    """Replace a file in one step: a reader, or a kill, finds the old text or the new."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text)
    os.replace(temporary, path)


def _plain(value: Any) -> Any:
    """Tuples as lists: YAML has no tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
