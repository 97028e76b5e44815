"""Rows of a list, a file, a `datasets.Dataset`, the hub or a task of reasoning-gym, as they stand there but for the columns that are declared."""

from __future__ import annotations

import glob
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastppo.data.columns import check_declared, declared
from fastppo.data.files import Placed, read_csv, read_json, read_json_lines
from fastppo.recipe_config import DataConfig
from fastppo.rewards.function import OWN_ARGUMENTS
from fastppo.rewards.reasoning_gym import PREFIX, task_rows

Row = dict[str, Any]

READERS = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
}
FORMATS = (*READERS, ".parquet")
HUB_NAME = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?")


def rows_of(source: Any, config: DataConfig, split: str | None = None) -> list[Row]:
    """The rows, with the values of `config.columns` turned into what they are declared as.

    Raises ValueError, TypeError: as `load_prompts`.
    """
    items = _items(source, split or config.split, config.task_arguments)
    rows = [declared(_as_row(item, where), config.columns, where) for where, item in items]
    if not rows and isinstance(source, str | Path):
        raise ValueError(f"{source} holds no row, expected at least one")
    if rows:
        check_declared(config.columns, {name for row in rows for name in row})
    return rows


def check_rows(rows: Sequence[Row]) -> list[str]:
    """The names of all columns, in the order in which they appear."""
    if not rows:
        raise ValueError("the data set is empty, expected at least one row")
    columns: dict[str, None] = {}
    for number, row in enumerate(rows):
        columns |= dict.fromkeys(_check_row(row, f"row {number}"))
    for name in ("prompt_ids", *OWN_ARGUMENTS):
        if name in columns:
            raise ValueError(
                f"the data has a column {name!r}, a name that fastppo gives away itself: rename or remove it"
            )
    return list(columns)


def _as_row(item: Any, where: str) -> Row:
    return {"prompt": item} if isinstance(item, str | list) else _check_row(item, where)


def _check_row(row: Any, where: str) -> Row:
    if not isinstance(row, Mapping) or not all(isinstance(name, str) for name in row):
        raise TypeError(
            f"{where} is {type(row).__name__}, expected a text, a conversation or a dict with names of columns"
        )
    return row


def is_task(source: Any) -> bool:
    """Whether it names a task of reasoning-gym: `reasoning_gym:TASK`."""
    return isinstance(source, str) and source.startswith(PREFIX)


def _items(source: Any, split: str, task_arguments: Mapping[str, Any]) -> Placed:
    if is_task(source):
        return _numbered(task_rows(source.removeprefix(PREFIX), task_arguments))
    if task_arguments:
        raise ValueError(f"task_arguments is set, but the prompts are not those of a task, {PREFIX}TASK")
    if isinstance(source, str | Path):
        return _read(str(source), split)
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(source, datasets.Dataset):
        return _numbered(source.to_list())
    if isinstance(source, Mapping) or not isinstance(source, Sequence):
        raise TypeError(
            f"prompts are {type(source).__name__}, expected a list of texts, conversations or dicts, a datasets.Dataset, a path or a "
            "hub name"
        )
    return _numbered(source)


def _numbered(items: Sequence[Any]) -> Placed:
    return ((f"row {number}", item) for number, item in enumerate(items))


def _read(source: str, split: str) -> Placed:
    path = Path(source).expanduser()
    if path.is_dir():
        raise ValueError(f"{source} is a folder, expected a file: {', '.join(FORMATS)}, also with .gz")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = next((suffix for suffix in reversed(suffixes) if suffix != ".gz"), "")
    if path.is_file():
        return _read_file(path, kind)
    hub = HUB_NAME.fullmatch(source)
    if kind in FORMATS or hub is None or source.startswith("."):
        raise ValueError(f"there is no file {source} (looked for {path.absolute()})")
    return _numbered(_read_hub(hub["name"], hub["config"], split))


def _read_file(path: Path, kind: str) -> Placed:
    if kind in READERS:
        return READERS[kind](path)
    if path.suffix.lower() == ".parquet":
        return _numbered(_read_parquet(path))
    raise ValueError(
        f"{path} has an unknown format, expected one of {', '.join(FORMATS)}, also with .gz except Parquet"
    )


def _read_parquet(path: Path) -> list[Row]:
    datasets = _datasets()
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        # A cache of its own, gone at once: otherwise a copy of every file stays in the user's home.
        with tempfile.TemporaryDirectory() as cache:
            files = [glob.escape(str(path.absolute()))]
            loaded = datasets.load_dataset(
                "parquet", data_files=files, split="train", cache_dir=cache, keep_in_memory=True
            )
            return loaded.to_list()
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {error.__cause__ or error}") from error
    finally:
        if bars:
            datasets.enable_progress_bars()


def _read_hub(name: str, config: str | None, split: str) -> list[Row]:
    datasets = _datasets()
    try:
        return datasets.load_dataset(name, config, split=split).to_list()
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{name} is no file here and cannot be read as a data set of the hub: {error}") from error


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "reading Parquet files and data sets of the hub needs the datasets package: pip install fastppo[data]"
        ) from error
    return datasets
