"""A run's folder: resolved settings, one line of metrics a step, samples, curves, checkpoints.

config.yaml  history.jsonl  metrics.jsonl  samples.jsonl  tracking.json  curve.png  checkpoints/  model/  best/

`config.yaml` holds the settings of now; `history.jsonl` has a line for each start and resume, with the step from which its settings held.
`earlier-1/` has the records of a run that had no checkpoint when it was to be resumed.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
import re
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from fastppo.checkpoint import list_checkpoints
from fastppo.yaml_numbers import NumberDumper

CONFIG, METRICS, SAMPLES, CHECKPOINTS = "config.yaml", "metrics.jsonl", "samples.jsonl", "checkpoints"
HISTORY, TRACKING, MODEL, ADAPTER, BEST, LOCK = "history.jsonl", "tracking.json", "model", "adapter", "best", ".lock"
MARK = "# Settings of a fastppo run\n"
# Half a character, which broken input can hold, becomes \udXXX: in JSON that is its escape, and it comes back as it was.
LONE_SURROGATES = "backslashreplace"
PRIVATE = 0o600


class RunFolder:
    """Creates or reopens the folder of a run; `start` or `resume` begins to record in it.

    Raises ValueError when `path` holds something else, or a run that `resume` did not ask to continue.
    """

    def __init__(self, path: str | Path, *, resume: bool = False) -> None:
        self.path = Path(path).expanduser().absolute()  # a reward in this process may change the working directory
        check_usable(self.path, resume=resume)
        self.path.mkdir(parents=True, exist_ok=True)

    def start(self, settings: Mapping[str, Any]) -> Path | None:
        """Record a run from its beginning. Records of steps that are there, but cannot be gone on from, are moved to the folder that is
        returned."""
        metrics, aside = self.path / METRICS, None
        if metrics.exists() and any(row["step"] > 0 for row in _read_lines(metrics)):
            aside = next(
                path for number in itertools.count(1) if not (path := self.path / f"earlier-{number}").exists()
            )
            aside.mkdir()
            for name in (CONFIG, HISTORY, METRICS, SAMPLES, TRACKING):
                if (self.path / name).exists():
                    (self.path / name).rename(aside / name)
        self._rewind(-1, -1)  # what a run that ended within its first step has left
        (self.path / TRACKING).unlink(missing_ok=True)
        _write_whole(self.path / HISTORY, "")
        self._record_settings(0, settings)
        return aside

    def resume(self, settings: Mapping[str, Any], step: int, *, metrics_step: int | None = None) -> list[str]:
        """Record on from checkpoint `step`, and drop what was recorded after it, of the metrics after `metrics_step`.

        Returns what `settings` changes, such as "optimizer.lr 1e-06 -> 2e-06".
        """
        self._rewind(step, step if metrics_step is None else metrics_step)
        before = read_settings(self.path)
        if before is not None and not (self.path / HISTORY).exists():
            self._append(HISTORY, {"step": 0, "settings": before})
        self._record_settings(step, settings)
        return [] if before is None else differences(before, as_written(settings))

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line; a number that is not finite becomes null, which every JSON reader takes."""
        row = {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
        self._append(METRICS, {"step": step, **row})

    def log_samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Append a line for each; what they may hold is in `fastppo.samples`."""
        for sample in samples:
            self._append(SAMPLES, {"step": step, **sample})

    @property
    def tracker_runs(self) -> dict[str, str]:
        """By which name or id each tracker knows this run; empty where it has none, or the file is damaged."""
        try:
            known = json.loads((self.path / TRACKING).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    @tracker_runs.setter
    def tracker_runs(self, known: Mapping[str, str]) -> None:
        _write_whole(self.path / TRACKING, json.dumps(dict(known), indent=1) + "\n")

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        with (self.path / name).open("a", encoding="utf-8", errors=LONE_SURROGATES) as file:
            file.write(_line(row))

    def _rewind(self, step: int, metrics_step: int) -> None:
        """Drop the rows of later steps, and a line that a kill cut off; all files are read before one is written."""
        paths = {self.path / METRICS: metrics_step, self.path / SAMPLES: step}
        kept = {
            path: [row for row in _read_lines(path) if row["step"] <= last]
            for path, last in paths.items()
            if path.exists()
        }
        for path, rows in kept.items():
            _write_whole(path, "".join(map(_line, rows)))

    def _record_settings(self, step: int, settings: Mapping[str, Any]) -> None:
        config, given, settings = self.path / CONFIG, _plain(settings), as_written(settings)
        if settings != given:
            warnings.warn(
                f"arguments in reward.functions hold what looks like a secret: {CONFIG} names environment variables in its place",
                stacklevel=4,
            )
        if config.exists() and not _is_ours(config) and config.stat().st_size:
            config.rename(config.with_suffix(".yaml.damaged"))
        # The rewards' arguments may hold what only their owner should read.
        rewards = settings.get("reward", {}).get("functions", [])
        mode = PRIVATE if any(reward["arguments"] for reward in rewards) else None
        row = {"step": step, "time": datetime.now().astimezone().isoformat(timespec="seconds"), "settings": settings}
        history = self.path / HISTORY
        before = history.read_text(encoding="utf-8", errors="replace") if history.exists() else ""
        _write_whole(history, before + _line(row), mode)
        _write_whole(config, MARK + yaml.dump(settings, Dumper=NumberDumper, sort_keys=False, allow_unicode=True), mode)

    @contextmanager
    def lock(self, note: Callable[[str], None]) -> Iterator[None]:
        """Keep every other run out of the folder. `note` is told where the file system knows no locks."""
        try:
            descriptor = _take_lock(self.path)
        except OSError as error:
            note(f"{self.path} cannot be locked ({error}): see to it that no other run writes to it")
            yield
            return
        try:
            yield
        finally:
            _release_lock(self.path, descriptor)


class Onlooker(RunFolder):
    """The folder of a run that another rank records: nothing is written to it here, and nothing is checked."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()

    def start(self, settings: Mapping[str, Any]) -> None:
        """Rank 0's."""

    def resume(self, settings: Mapping[str, Any], step: int, *, metrics_step: int | None = None) -> list[str]:
        return []

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Rank 0's."""

    def log_samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Rank 0's."""

    @contextmanager
    def lock(self, note: Callable[[str], None]) -> Iterator[None]:
        yield


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, in order, also of a run that is under way. Raises FileNotFoundError when `path` is no run folder, or
    that of a run that has finished no step yet."""
    folder = Path(path).expanduser()
    if (folder / METRICS).is_file():
        return _read_lines(folder / METRICS)
    if _is_ours(folder / CONFIG):
        raise FileNotFoundError(f"{path} has no {METRICS} yet: the run has finished no step")
    what = f"it has no {METRICS}" if folder.is_dir() else "it is a file" if folder.exists() else "it does not exist"
    raise FileNotFoundError(f"{path} is no run folder: {what}")


def read_samples(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's samples.jsonl, in order; none where it has no such file."""
    file = Path(path).expanduser() / SAMPLES
    return _read_lines(file) if file.is_file() else []


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """{"step", "time", "settings"} of every start and resume of a run; none where it has no such file."""
    file = Path(path).expanduser() / HISTORY
    return _read_lines(file) if file.is_file() else []


def read_settings(path: str | Path) -> dict[str, Any] | None:
    """The settings that a run folder's config.yaml holds; where that is damaged, those of its last start or resume; else None."""
    config = Path(path).expanduser() / CONFIG
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8")) if _is_ours(config) else None
    except (yaml.YAMLError, ValueError):
        settings = None
    if isinstance(settings, dict):
        return settings
    try:
        return _read_lines(config.with_name(HISTORY))[-1]["settings"]
    except (OSError, ValueError, LookupError):
        return None


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
    """Raises ValueError when a run cannot be recorded in `path`: it holds something else, a run that `resume` did not ask to continue, or a
    file where a folder must be; nothing can be written there; or another process is at work there."""
    path = Path(path).expanduser()
    name = f"output_dir {str(path)!r}"
    if path.exists() and not path.is_dir():
        raise ValueError(f"output_dir is {str(path)!r}, which is a file, expected a folder")
    if os.fsencode(path.absolute()) != str(path.absolute()).encode("utf-8", "surrogatepass"):
        raise ValueError(
            f"output_dir is {ascii(str(path))}, whose name is not UTF-8, in which tokenizers are written: rename the folder, or set PYTHONUTF8=1 "
            f"where the locale's encoding ({sys.getfilesystemencoding()}) is another"
        )
    if path.is_symlink() and not path.exists():
        raise ValueError(
            f"output_dir is {str(path)!r}, a link to {os.readlink(path)!r}, which does not exist: make that folder first"
        )
    require_writable_folder(path, "output_dir")
    content = {entry.name for entry in path.iterdir()} if path.exists() else set()
    passing = {_temporary(path / file).name for file in (CONFIG, HISTORY, METRICS, SAMPLES, TRACKING)}
    is_run = _is_ours(path / CONFIG) or list_checkpoints(path / CHECKPOINTS)  # config.yaml may be damaged
    if content - passing - {LOCK} and not is_run:
        raise ValueError(f"output_dir is {str(path)!r}, which holds other files; choose an empty or new folder")
    for entry in content & {CONFIG, HISTORY, METRICS, SAMPLES, TRACKING, CHECKPOINTS, MODEL, ADAPTER, BEST}:
        is_folder, should_be = (path / entry).is_dir(), entry in (CHECKPOINTS, MODEL, ADAPTER, BEST)
        if is_folder != should_be:
            kinds = ("a file", "a folder") if should_be else ("a folder", "a file")
            raise ValueError(f"{path / entry} is {kinds[0]}, expected {kinds[1]}: move it away")
        if is_folder:
            require_writable_folder(path / entry, "output_dir's folder")
    if LOCK in content:
        _check_unlocked(path)
    if content & {METRICS, CHECKPOINTS} and not resume:
        raise ValueError(f"{name} holds a run already: resume it (--resume), or choose another output_dir")


def require_writable_folder(path: str | Path, called: str) -> None:
    """Raises ValueError where no file can be made in a folder, or in the one that it would be made in. Nothing is left there."""
    path = Path(path).expanduser().absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        why = f"{there} is a file" if there.is_file() else f"nothing can be written in {there} ({error.strerror})"
        raise ValueError(f"{called} is {str(path)!r}, expected a folder that can be written to: {why}") from error


def _is_ours(config: Path) -> bool:
    """Whether config.yaml is one of ours: other tools write files of that name too."""
    return config.is_file() and config.read_bytes().startswith(MARK.encode())


# One run a folder. The kernel's lock ends with its process, however that ends, is not inherited by the processes of rewards, and holds over NFS
# too; but it lets the process that holds it in again, so that a process keeps a list of its own.

_locked_here: set[Path] = set()
_list_lock = threading.Lock()


def _take_lock(path: Path) -> int:
    """Descriptor of a folder's locked file. Raises ValueError naming the process that has it, OSError where it cannot be locked."""
    with _list_lock:
        if path.resolve() in _locked_here:
            raise ValueError(f"output_dir {str(path)!r} is in use by another run of this process ({os.getpid()})")
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(descriptor, 1000).decode(errors="replace") or "another process"
            os.close(descriptor)
            if not isinstance(error, BlockingIOError | PermissionError):
                raise
            raise ValueError(
                f"output_dir {str(path)!r} is in use by {owner}: wait for it, end it, or choose another output_dir"
            ) from error
        _locked_here.add(path.resolve())
    with suppress(OSError):  # who it is matters to nobody but the reader of that message
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return descriptor


def _release_lock(path: Path, descriptor: int) -> None:
    with _list_lock:
        with suppress(OSError):
            os.truncate(descriptor, 0)
        os.close(descriptor)
        _locked_here.discard(path.resolve())


def _check_unlocked(path: Path) -> None:
    """Raises ValueError where a run is at work in the folder."""
    with suppress(OSError):  # no locks here, or a folder that may not be written to: whoever writes will say so
        _release_lock(path, _take_lock(path))


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.writing")


def _write_whole(path: Path, text: str, mode: int | None = None) -> None:
    """Replace a file in one step: a reader, or a kill, finds the old text or the new."""
    temporary = _temporary(path)
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode)
    with open(descriptor, "w", encoding="utf-8", errors=LONE_SURROGATES) as file:
        file.write(text)
    os.replace(temporary, path)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"


# Settings as they are written

_SECRET_NAME = re.compile(
    r"(api|access|secret|private|auth)_?(key|token)|secret|passw|credential|bearer|authorization", re.IGNORECASE
)
_SECRET_TEXT = re.compile(r"(sk-|hf_|gh[pousr]_|xox[abp]-|AKIA|eyJ)[\w.-]{8,}")


def as_written(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without tuples, which YAML has not, and without what looks like a secret among the rewards' arguments."""
    settings = _plain(settings)
    for reward in settings.get("reward", {}).get("functions", []):
        reward["arguments"] = _without_secrets(reward["arguments"])
    return settings


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _without_secrets(value: Any, name: str = "") -> Any:
    """Texts that look like a secret become the name of an environment variable: `api_key: sk-...` is written `api_key: ${env:API_KEY}`."""
    if isinstance(value, Mapping):
        return {key: _without_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_secrets(item, name) for item in value]
    if not isinstance(value, str) or "${env:" in value or not value:
        return value
    if _SECRET_NAME.search(name) or _SECRET_TEXT.match(value):
        return "${env:" + re.sub(r"\W", "_", name).upper() + "}"
    return value


def differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """ "section.key old -> new" of every setting that is not the same."""
    found = []
    for key in dict.fromkeys((*before, *after)):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} {old!r} -> {new!r}")
    return found
