"""JSON Lines, JSON and CSV files as they stand: no value is guessed at, and an error names the file and the line."""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Placed = Iterator[tuple[str, Any]]
"""(where it stands, for messages; a row)"""

SEPARATORS = ",;\t"
QUOTED = re.compile(r'"[^"]*"')
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_json_lines(path: Path) -> Placed:
    """One value on each line; empty lines are passed over. Raises ValueError naming file and line."""
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, parse_json(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: {error.msg} (column {error.colno}), expected one JSON value") from error
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error


def read_json(path: Path) -> Placed:
    """The items of one list, or, where the file begins otherwise, JSON Lines. Raises ValueError naming file and line."""
    text = "".join(_lines(path))
    if not text.lstrip().startswith("["):
        yield from read_json_lines(path)
        return
    try:
        items = parse_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}, expected one list of rows") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    for number, item in enumerate(items):
        yield f"{path}, row {number}", item


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, also where an object has a key twice: the second would silently replace the first."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise ValueError(f"the key {_repeated([name for name, _ in pairs])!r} stands twice in {str(mapping)[:100]}")
    return mapping


def read_csv(path: Path) -> Placed:
    """Rows by the header's names, every value a text. The separator is a tab in a .tsv file; elsewhere it is that of comma, semicolon and
    tab which the header has most of. Empty lines are passed over. Raises ValueError naming file and line.
    """
    lines = list(_lines(path))
    first = QUOTED.sub("", next((line for line in lines if line.strip()), ""))
    separator = "\t" if ".tsv" in path.name.lower() else max(SEPARATORS, key=first.count)
    records = _records(path, lines, separator)
    where, header = next(records, (str(path), []))
    if len(set(header)) < len(header):
        raise ValueError(f"{where}: the header names {_repeated(header)!r} twice, expected a name for each column")
    for where, record in records:
        if len(record) != len(header):
            raise ValueError(
                f"{where} has {len(record)} fields, expected {len(header)} as in the header "
                f"(fields end with {separator!r}; one that holds it is quoted)"
            )
        yield where, dict(zip(header, record, strict=True))


def _records(path: Path, lines: list[str], separator: str) -> Iterator[tuple[str, list[str]]]:
    reader = csv.reader(lines, delimiter=separator, strict=True)
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        limit = csv.field_size_limit(sys.maxsize)  # the module's own would refuse long texts
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{where}: {error} (a quote within a quoted field is doubled)") from error
        finally:
            csv.field_size_limit(limit)
        if record:
            yield where, record


def _repeated(names: list[str]) -> str:
    return next(name for name in names if names.count(name) > 1)


def _lines(path: Path) -> Iterator[str]:
    """Lines with their ends as they are. Raises ValueError for a file that cannot be read and for bytes that are not UTF-8."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield (line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line).decode()
                except UnicodeDecodeError as error:
                    byte = line[error.start]
                    raise ValueError(
                        f"{path}, line {number} is not UTF-8 (byte 0x{byte:02x}): save it as UTF-8"
                    ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
