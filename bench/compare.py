"""What changed between two records: the ratio of every row's times, and whether it is more than their spread."""

from __future__ import annotations

from rich.table import Table

from fastppo.bench.harness import Row
from fastppo.bench.record import Record
from fastppo.bench.report import seconds

FASTER, SLOWER, SAME = "faster", "slower", ""
STYLES = {FASTER: "green", SLOWER: "red"}


def verdict(old: Row, new: Row) -> str:
    """A change counts where the two spreads (p20 to p80) do not overlap."""
    if old.status != new.status:
        return f"{old.status} -> {new.status}"
    if old.status != "ok":
        return SAME
    if new.p80_s < old.p20_s:
        return FASTER
    return SLOWER if new.p20_s > old.p80_s else SAME


def pairs(old: Record, new: Record) -> list[tuple[Row | None, Row | None]]:
    """The rows of one case and provider, in the new record's order; then those that only the old one has."""
    rows = [{(row.op, row.case, row.provider): row for row in record.rows} for record in (old, new)]
    before, after = rows
    found = [(before.get(key), row) for key, row in after.items()]
    return found + [(row, None) for key, row in before.items() if key not in after]


def cells(old: Row | None, new: Row | None) -> tuple[str, ...]:
    """Case, provider, both times, their ratio, and what it means."""
    row = new or old
    names = f"{row.op} {row.case}", row.provider
    times = [seconds(row.median_s) if row and row.median_s else "" for row in (old, new)]
    if old is None or new is None:
        return (*names, *times, "", "new" if old is None else "gone")
    ratio = f"{new.median_s / old.median_s:.2f}x" if old.median_s and new.median_s else ""
    return (*names, *times, ratio, verdict(old, new))


def describe(record: Record) -> str:
    machine = record.machine
    return f"{record.date[:16]} {(record.revision or 'unknown')[:12]}, {machine.processor}, {machine.threads} threads"


def table(old: Record, new: Record) -> Table:
    """A line for each row; ValueError where the records are of two kinds of device."""
    if old.machine.device != new.machine.device:
        raise ValueError(
            f"--compare: the first record is of a {old.machine.device}, the second of a {new.machine.device} device"
        )
    warning = "quick: times mean nothing" if old.quick or new.quick else None
    made = Table(title=f"{describe(old)}\n{describe(new)}", caption=warning)
    for column in ("case", "provider", "old", "new", "new / old", "change"):
        made.add_column(column, justify="right" if column in ("old", "new", "new / old") else "left")
    for pair in pairs(old, new):
        line = cells(*pair)
        made.add_row(*line, style=STYLES.get(line[-1]) or ("yellow" if line[-1] else None))
    return made
