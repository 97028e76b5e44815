"""Turns rows into a terminal table and into the generated parts of `docs/performance.md` and `README.md`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.table import Table

from fastppo.bench.harness import EAGER, OURS, Row
from fastppo.bench.record import Record

COLUMNS = (
    "case",
    "provider",
    "median",
    "p20-p80",
    "GB/s",
    "of copy",
    "GFLOP/s",
    "vs eager",
    "target",
    "error",
    "peak memory",
)
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"


def seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"


def optional(value: float | None, pattern: str) -> str:
    return "" if value is None else pattern.format(value)


def peak(row: Row) -> str:
    share = optional(row.memory_share, " ({:.1%} of eager)")
    return optional(row.peak_bytes and row.peak_bytes / 1e6, "{:.1f} MB") + share or row.peak_reason or ""


def target(row: Row) -> str:
    if not row.has_target:
        return ""
    wanted = [optional(row.target_speedup, ">= {:.3g}x"), optional(row.target_memory_share, "memory <= {:.0%}")]
    return f"{', '.join(filter(None, wanted))}: {'met' if row.target_met else 'not met'}"


def cells(row: Row) -> tuple[str, ...]:
    """The row's columns after its case, empty where nothing was measured."""
    if row.status != "ok":
        return (row.provider, row.status, "", "", "", "", "", target(row), optional(row.error, "{:.1e}"), "")
    return (
        row.provider,
        seconds(row.median_s),
        f"{seconds(row.p20_s)} - {seconds(row.p80_s)}",
        f"{row.gb_per_s:.3g}",
        f"{row.copy_share:.0%}",
        optional(row.gflop_per_s, "{:.0f}"),
        optional(row.speedup, "{:.2f}x"),
        target(row),
        optional(row.error, "{:.1e}"),
        peak(row),
    )


def titles(rows: Iterable[Row]) -> list[str]:
    """Op and case of each row, empty where it repeats the row above."""
    names = [f"{row.op} {row.case}" for row in rows]
    return [name if i == 0 or names[i - 1] != name else "" for i, name in enumerate(names)]


def terminal_table(record: Record) -> Table:
    machine = record.machine
    copy = f"copy {machine.copy_bandwidth / 1e9:.1f} GB/s"
    table = Table(
        title=f"{machine.processor}, {machine.threads} threads, {machine.isa}, {copy}",
        caption="quick: small inputs and few rounds, times mean nothing" if record.quick else None,
    )
    for column in COLUMNS:
        table.add_column(
            column, justify="left" if column in ("case", "provider", "target") else "right", overflow="fold"
        )
    for title, row in zip(titles(record.rows), record.rows, strict=True):
        style = {"wrong": "red", "raised": "red"}.get(row.status) or ("yellow" if row.target_met is False else None)
        if title and table.row_count:
            table.add_section()
        table.add_row(title, *cells(row), style=style)
    return table


def failures(rows: Iterable[Row]) -> list[str]:
    """One line for each row that is wrong or raised."""
    return [f"{name(row)}, {row.provider}: {row.status}: {row.reason}" for row in rows if row.status != "ok"]


def below_target(rows: Iterable[Row]) -> list[str]:
    """One line for each of our rows that misses its target, with what it reached."""
    return [f"{name(row)}: {reached(row)}, target {target(row)}" for row in rows if row.target_met is False]


def name(row: Row) -> str:
    return f"{row.op} {row.case}"


def reached(row: Row) -> str:
    if row.status != "ok":
        return row.status
    speed = optional(row.speedup, "{:.2f}x eager's speed") or "no speed-up to eager"
    if row.target_memory_share is None:
        return speed
    memory = optional(row.memory_share, "{:.1%} of its peak memory") or f"peak memory unknown ({row.peak_reason})"
    return f"{speed}, {memory}"


def markdown(record: Record, record_name: str) -> str:
    """Machine, table and what falls short, for the docs."""
    machine = record.machine
    versions = ", ".join(f"{package} {version}" for package, version in record.versions.items())
    lines = [
        f"Measured {record.date[:10]} at revision `{(record.revision or 'unknown')[:12]}` on {machine.processor}, "
        f"{machine.threads} threads, {machine.isa} kernels, {machine.cache_bytes >> 20} MiB last-level cache, "
        f"{machine.system}; copy bandwidth {machine.copy_bandwidth / 1e9:.1f} GB/s; {versions}. "
        f"Record: `{record_name}`.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
    ]
    for title, row in zip(titles(record.rows), record.rows, strict=True):
        emphasis = f"**{row.provider}**" if row.provider == OURS else row.provider
        lines.append(f"| {' | '.join((title, emphasis, *cells(row)[1:]))} |")
    short = below_target(record.rows) + failures(record.rows)
    lines += [
        "",
        "What falls short:" if short else "Every target is met.",
        *([""] if short else []),
        *(f"- {s}" for s in short),
    ]
    return "\n".join(lines) + "\n"


def summary(record: Record, record_name: str) -> str:
    """Our rows that have a baseline, for the README."""
    machine = record.machine
    lines = ["| case | fastppo | plain PyTorch | ratio |", "|---|---|---|---|"]
    eager = {(row.op, row.case): row for row in record.rows if row.provider == EAGER}
    for row in record.rows:
        if row.provider == OURS and row.speedup is not None:
            baseline = seconds(eager[row.op, row.case].median_s)
            ratio = f"{row.speedup:.2g}x" + optional(row.memory_share, ", {:.0%} of the memory")
            lines.append(f"| `{row.op}` {row.case} | {seconds(row.median_s)} | {baseline} | {ratio} |")
    source = f"{machine.processor}, {machine.threads} threads, {machine.isa} kernels, torch {record.versions['torch']}"
    return "\n".join([*lines, "", f"{source}; record: `{record_name}`."]) + "\n"


def write_between_markers(path: Path, text: str) -> None:
    """Replaces what stands between the markers of `path`; ValueError where one is missing."""
    old = path.read_text()
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise ValueError(f"{path} must hold the lines {BEGIN} and {END} once each, in this order")
    path.write_text(f"{old.split(BEGIN)[0]}{BEGIN}\n{text}{END}{old.split(END)[1]}")


def write_docs(record: Record, record_name: str, docs: Path, readme: Path) -> None:
    """Writes the whole table into `docs` and the summary into `readme`; ValueError for the record of a quick run."""
    if record.quick:
        raise ValueError(f"{record_name} is a quick run: its times mean nothing, run without --quick")
    write_between_markers(docs, markdown(record, record_name))
    write_between_markers(readme, summary(record, record_name))
