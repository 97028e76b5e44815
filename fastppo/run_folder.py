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

from fastppo.yaml_numbers import NumberDumper

CONFIG, METRICS, SAMPLES, CHECKPOINTS = "config.yaml", "metrics.jsonl", "samples.jsonl", "checkpoints"
MARK = "# Settings of a fastppo run\n"
# Half a character, which broken input can hold, becomes \udXXX: in JSON that is its escape, and it comes back as it was.
LONE_SURROGATES = "backslashreplace"


class RunFolder:
    """Creates or reopens the folder of a run.

    Raises ValueError when `path` holds something else, or a run that `resume` did not ask to continue.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], *, resume: bool = False) -> None:
        self.path = Path(path).absolute()  # a reward in this process may change the working directory
        check_usable(self.path, resume=resume)
        self.path.mkdir(parents=True, exist_ok=True)
        text = yaml.dump(_plain(settings), Dumper=NumberDumper, sort_keys=False, allow_unicode=True)
        _write_whole(self.path / CONFIG, MARK + text)
        if not resume:
            self.rewind(-1)  # samples of a run that ended within its first step

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line; a number that is not finite becomes null, which every JSON reader takes."""
        row = {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
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
        with (self.path / name).open("a", encoding="utf-8", errors=LONE_SURROGATES) as file:
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
    """The rows of a JSON Lines file; a torn last line, which a kill can leave, is passed over.

    Raises ValueError naming the file and the line of anything else that is no row.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}; remove that line") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"{path}, line {number} is no row with a step; remove that line")
        rows.append(row)
    return rows


def check_usable(path: str | Path, *, resume: bool = False) -> None:
    """Raises ValueError when a run cannot be recorded in `path`: it holds something else, or a run that `resume` did not ask to continue."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"output_dir is {str(path)!r}, which is a file, expected a folder")
    content = {entry.name for entry in path.iterdir()} if path.exists() else set()
    if content - {_temporary(path / CONFIG).name} and not _is_run(path):
        raise ValueError(f"output_dir is {str(path)!r}, which holds other files; choose an empty or new folder")
    if content & {METRICS, CHECKPOINTS} and not resume:
        raise ValueError(
            f"output_dir {str(path)!r} holds a run already: resume it (--resume), or choose another output_dir"
        )


def _is_run(path: Path) -> bool:
    """Whether the folder's config.yaml is one of ours: other tools write files of that name too."""
    config = path / CONFIG
    return config.is_file() and config.read_bytes().startswith(MARK.encode())


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.writing")


def _write_whole(path: Path, text: str) -> None:
    """Replace a file in one step: a reader, or a kill, finds the old text or the new."""
    temporary = _temporary(path)
    temporary.write_text(text, encoding="utf-8", errors=LONE_SURROGATES)
    os.replace(temporary, path)


def _plain(value: Any) -> Any:
    """Tuples as lists: YAML has no tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
