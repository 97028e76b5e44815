"""Turns rows into a terminal table and into the generated parts of `docs/performance.md`, `docs/drop-in.md` and `README.md`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.table import Table

from fastppo.bench import scaling
from fastppo.bench.harness import ALL, Row, times_the_speed
from fastppo.bench.peers import EAGER, OURS, OWN
from fastppo.bench.record import Machine, Record

COLUMNS = (
    "case",
    "provider",
    "median",
    "p20-p80",
    "GB/s",
    "of copy",
    "GFLOP/s",
    "speed-up",
    "best peer",
    "target",
    "error",
    "peak memory",
)
LEVEL = 0.97  # of the best peer's speed: what is below is behind it
DROP_IN = "drop_in"
DROP_IN_COLUMNS = (
    "package",
    "what",
    "theirs",
    "fastppo",
    "speed-up",
    "error, theirs",
    "error, fastppo",
    "peak memory, theirs",
    "peak memory, fastppo",
)
LEAST_PEAK = 4 << 20  # that a share is told of: a peak is known to about a megabyte
# Where the figures of each kind of machine stand in a page, and those of the drop-in functions, which are a CPU's.
MARKERS = {
    DROP_IN: ("<!-- bench drop-in: begin -->", "<!-- bench drop-in: end -->"),
    "cpu": ("<!-- bench: begin -->", "<!-- bench: end -->"),
    "cuda": ("<!-- bench cuda: begin -->", "<!-- bench cuda: end -->"),
}


def seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"


def optional(value: float | None, pattern: str) -> str:
    return "" if value is None else pattern.format(value)


def peak(row: Row) -> str:
    share = optional(row.memory_share, f" ({{:.1%}} of {row.baseline})")
    return optional(row.peak_bytes and row.peak_bytes / 1e6, "{:.1f} MB") + share or row.peak_reason or ""


def target(row: Row) -> str:
    if not row.has_target:
        return ""
    wanted = [
        optional(row.target_speedup, ">= {:.3g}x"),
        optional(row.target_copy_share, ">= {:.0%} of copy"),
        optional(row.target_flop_share, ">= {:.0%} of matmul"),
        row.target_s and f"<= {seconds(row.target_s)}",
        optional(row.target_memory_share, "memory <= {:.0%}"),
        optional(row.target_peak_bytes and row.target_peak_bytes / 1e6, "memory <= {:.0f} MB"),
    ]
    return f"{', '.join(filter(None, wanted))}: {'met' if row.target_met else 'not met'}"


def best_peer(row: Row, rows: Iterable[Row]) -> tuple[str, float] | None:
    """Of one of our rows: the fastest of those that are not ours and gave right results, and how many times its speed we have."""
    if row.provider != OURS or row.status != "ok":
        return None
    others = (other for other in rows if (other.op, other.case) == (row.op, row.case) and other.provider not in OWN)
    ratios = [(other.provider, times_the_speed(row, other)) for other in others if other.status == "ok"]
    return min(ratios, key=lambda ratio: ratio[1], default=None)


def behind(rows: list[Row]) -> list[str]:
    """One line for each of our rows that its best peer outruns."""
    found = [(row, best_peer(row, rows)) for row in rows]
    return [
        f"{name(row)}: {best[1]:.2f}x the speed of {best[0]}"
        for row, best in found
        if best is not None and best[1] < LEVEL
    ]


def cells(row: Row, rows: list[Row]) -> tuple[str, ...]:
    """The row's columns after its case, of the table of `rows`; empty where nothing was measured."""
    if row.status != "ok":
        return (
            row.provider,
            row.status,
            "",
            "",
            "",
            "",
            "",
            "",
            target(row),
            optional(row.error, "{:.1e}"),
            row.reason or "",
        )
    best = best_peer(row, rows)
    return (
        row.provider,
        seconds(row.median_s),
        f"{seconds(row.p20_s)} - {seconds(row.p80_s)}",
        optional(row.gb_per_s, "{:.3g}"),
        optional(row.copy_share, "{:.0%}"),
        optional(row.gflop_per_s, "{:.0f}") + optional(row.flop_share, " ({:.0%} of matmul)"),
        optional(row.speedup, "{:.2f}x"),
        f"{best[1]:.2f}x {best[0]}" if best else "",
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
    copy = f"copy {machine.copy_bandwidth / 1e9:.1f} GB/s{matmul(machine)}"
    table = Table(
        title=f"{kernels(machine, machine.isa)}, {copy}",
        caption=caption(record),
    )
    for column in COLUMNS:
        table.add_column(
            column, justify="left" if column in ("case", "provider", "target") else "right", overflow="fold"
        )
    for title, row in zip(titles(record.rows), record.rows, strict=True):
        style = {"wrong": "red", "raised": "red", "skipped": "dim"}.get(row.status) or (
            "yellow" if row.target_met is False else None
        )
        if title and table.row_count:
            table.add_section()
        table.add_row(title, *cells(row, record.rows), style=style)
    return table


def caption(record: Record) -> str | None:
    notes = []
    if record.machine.device == "cpu" and record.machine.torch_isa:
        notes.append(f"instruction sets: fastppo {record.machine.isa}, torch {record.machine.torch_isa}")
    if record.quick:
        notes.append("quick: small inputs and few rounds, times mean nothing")
    return "; ".join(notes) or None


SCALING_COLUMNS = ("op", "over", "provider", "lengths", "seconds", "peak memory", "exponent")


def scaling_lines(record: Record) -> list[tuple[str, ...]]:
    """A line for each curve: what grows, the times at the shortest and the longest, the exponent that fits all."""
    lines = []
    for curve in scaling.curves(record.scaling):
        first, last = curve.rows[0], curve.rows[-1]
        peaks = [optional(row.peak_bytes and row.peak_bytes / 1e6, "{:.0f} MB") for row in (first, last)]
        lines.append(
            (
                curve.op,
                curve.axis,
                curve.provider,
                f"{first.length} - {last.length}",
                f"{seconds(first.median_s)} - {seconds(last.median_s)}",
                " - ".join(filter(None, peaks)),
                optional(curve.exponent, "{:.2f}"),
            )
        )
    return lines


def scaling_table(record: Record) -> Table:
    table = Table(title="scaling: time ~ length^exponent")
    for column in SCALING_COLUMNS:
        table.add_column(column, justify="left" if column in ("op", "over", "provider") else "right")
    for line in scaling_lines(record):
        table.add_row(*line)
    return table


def kernels(machine: Machine, isa: str) -> str:
    """What computes: "processor, threads, instruction set", or the GPU's name."""
    if machine.device != "cpu":
        return machine.processor
    return f"{machine.processor}, {machine.threads} thread{'s' * (machine.threads != 1)}, {isa}"


def both_isas(machine: Machine) -> str:
    """The instruction set of our kernels, and torch's where the record has it and it is another."""
    other = machine.torch_isa not in (None, machine.isa)
    return f"{machine.isa} kernels" + (f" (torch's {machine.torch_isa})" if other else "")


def matmul(machine: Machine) -> str:
    return "".join(f", {dtype} matmul {rate / 1e12:.3g} TFLOP/s" for dtype, rate in machine.matmul_rates.items())


def failures(rows: Iterable[Row]) -> tuple[list[str], list[str]]:
    """One line for each row that is wrong or raised: those of ours and of plain PyTorch, which must not, and those of peers."""
    ours, of_peers = [], []
    for row in rows:
        if row.status not in ("ok", "skipped"):
            failed = ours if row.provider in (*OWN, EAGER, ALL) else of_peers
            failed.append(f"{name(row)}, {row.provider}: {row.status}: {row.reason}")
    return ours, of_peers


def below_target(rows: Iterable[Row]) -> list[str]:
    """One line for each of our rows that misses its target, with what it reached."""
    return [f"{name(row)}: {reached(row)}, target {target(row)}" for row in rows if row.target_met is False]


def name(row: Row) -> str:
    return f"{row.op} {row.case}"


def reached(row: Row) -> str:
    if row.status != "ok":
        return row.status
    unknown = f"peak memory unknown ({row.peak_reason})"
    parts = [
        (
            row.target_speedup,
            optional(row.speedup, f"{{:.2f}}x {row.baseline}'s speed") or f"no speed-up to {row.baseline}",
        ),
        (row.target_copy_share, optional(row.copy_share, "{:.0%} of copy")),
        (row.target_flop_share, optional(row.flop_share, "{:.0%} of matmul")),
        (row.target_s, row.median_s and seconds(row.median_s)),
        (row.target_memory_share, optional(row.memory_share, "{:.1%} of its peak memory") or unknown),
        (row.target_peak_bytes, optional(row.peak_bytes and row.peak_bytes / 1e6, "{:.0f} MB") or unknown),
    ]
    return ", ".join(reached for target, reached in parts if target is not None and reached)


def markdown(record: Record, record_name: str) -> str:
    """Machine, table and what falls short, for the docs."""
    machine, rows = record.machine, [row for row in record.rows if row.op != DROP_IN]
    versions = ", ".join(f"{package} {version}" for package, version in record.versions.items())
    lines = [
        f"Measured {record.date[:10]} at revision `{(record.revision or 'unknown')[:12]}` on "
        f"{kernels(machine, both_isas(machine))}, {machine.cache_bytes >> 20} MiB last-level cache, "
        f"{machine.system}; copy bandwidth {machine.copy_bandwidth / 1e9:.1f} GB/s{matmul(machine)}; {versions}. "
        f"Record: `{record_name}`.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
    ]
    for title, row in zip(titles(rows), rows, strict=True):
        emphasis = f"**{row.provider}**" if row.provider == OURS else row.provider
        lines.append(f"| {' | '.join((title, emphasis, *cells(row, rows)[1:]))} |")
    lines += behind_lines(rows)
    if record.scaling:
        lines += ["", "Scaling: time ~ length^exponent.", "", f"| {' | '.join(SCALING_COLUMNS)} |"]
        lines += [f"|{'---|' * len(SCALING_COLUMNS)}", *(f"| {' | '.join(line)} |" for line in scaling_lines(record))]
    short = below_target(rows) + sum(failures(rows), [])
    lines += [
        "",
        "What falls short:" if short else "Every target is met.",
        *([""] if short else []),
        *(f"- {s}" for s in short),
    ]
    return "\n".join(lines) + "\n"


def behind_lines(rows: list[Row]) -> list[str]:
    """What stands below a page's table of `rows`."""
    found = behind(rows)
    if not rows:
        return []
    if not found:
        return ["", f"None is below {LEVEL:g}x the speed of its best peer."]
    return ["", f"Below {LEVEL:g}x the speed of the best peer:", "", *(f"- {line}" for line in found)]


def summary(record: Record, record_name: str) -> str:
    """Our rows that eager is measured beside, for the README."""
    lines = ["| case | fastppo | plain PyTorch | ratio |", "|---|---|---|---|"]
    eager = {(row.op, row.case): row for row in record.rows if row.provider == EAGER}
    for row in record.rows:
        if row.provider == OURS and row.baseline == EAGER and row.speedup is not None:
            baseline = seconds(eager[row.op, row.case].median_s)
            ratio = times(row.speedup) + optional(row.memory_share, ", {:.0%} of the memory")
            lines.append(f"| `{row.op}` {row.case} | {seconds(row.median_s)} | {baseline} | {ratio} |")
    return "\n".join([*lines, "", source(record, record_name)]) + "\n"


def source(record: Record, record_name: str) -> str:
    """Where figures are from."""
    machine = record.machine
    return f"{kernels(machine, both_isas(machine))}, torch {record.versions['torch']}; record: `{record_name}`."


def times(ratio: float) -> str:
    return f"{ratio:{'.0f' if ratio >= 10 else '.2g'}}x"


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.005 else "under 1%"


def drop_in_pairs(record: Record) -> list[tuple[Row, Row]]:
    """(theirs, ours) of each function and step of another package."""
    theirs = {row.case: row for row in record.rows if row.op == DROP_IN and row.provider == row.baseline}
    ours = [row for row in record.rows if row.op == DROP_IN and row.provider == OURS]
    return [(theirs[row.case], row) for row in ours if row.case in theirs]


def drop_in_names(row: Row) -> tuple[str, str]:
    """The package, and what of it."""
    return row.baseline, row.case.removeprefix(row.baseline).strip()


def drop_in_cells(theirs: Row, ours: Row) -> tuple[str, ...]:
    both = theirs, ours
    return (
        *drop_in_names(ours),
        *(seconds(row.median_s) if row.median_s else row.status for row in both),
        f"**{times(ours.speedup)}**" if ours.speedup else "",
        *(optional(row.error, "{:.1e}") for row in both),
        *(optional(row.peak_bytes and row.peak_bytes / 1e6, "{:.1f} MB") or row.peak_reason or "" for row in both),
    )


def drop_in_markdown(record: Record, record_name: str) -> str:
    """Theirs beside ours, and what is wrong, for docs/drop-in.md."""
    pairs = drop_in_pairs(record)
    lines = [cells_line(drop_in_cells(*pair)) for pair in pairs]
    wrong = [f"- {line}" for line in sum(failures(row for pair in pairs for row in pair), [])]
    below = behind_lines([row for pair in pairs for row in pair])
    return page_table(
        DROP_IN_COLUMNS, lines, [*([""] if wrong else []), *wrong, *below, "", source(record, record_name)]
    )


def drop_in_summary(record: Record, record_name: str) -> str:
    """What replacing brings, for the README."""
    lines = []
    for theirs, ours in drop_in_pairs(record):
        if ours.speedup is not None:
            share = ours.memory_share if theirs.peak_bytes and theirs.peak_bytes >= LEAST_PEAK else None
            lines.append(
                cells_line((*drop_in_names(ours), times(ours.speedup), "" if share is None else percent(share)))
            )
    columns = ("package", "what", "speed-up", "of its peak memory")
    return page_table(columns, lines, ["", source(record, record_name)])


def page_table(columns: Iterable[str], lines: list[str], below: list[str]) -> str:
    """Markdown; of a record without such rows only what stands below."""
    heading = [cells_line(columns), f"|{'---|' * len(tuple(columns))}"] if lines else ["Not measured in this record."]
    return "\n".join([*heading, *lines, *below]) + "\n"


def cells_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_between_markers(path: Path, place: str, text: str) -> None:
    """Replaces what stands between the markers of `place` in `path`; ValueError where one is missing."""
    old = path.read_text()
    begin, end = MARKERS[place]
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        raise ValueError(f"{path} must hold the lines {begin} and {end} once each, in this order")
    path.write_text(f"{old.split(begin)[0]}{begin}\n{text}{end}{old.split(end)[1]}")


def write_docs(record: Record, record_name: str, docs: Path, readme: Path, drop_in: Path) -> None:
    """Writes the whole table into `docs` and the summary into `readme`, where the kind of machine has its place, and what a CPU's record
    says of other packages' functions, where it has any, into `drop_in` and `readme`; ValueError for the record of a quick run."""
    if record.quick:
        raise ValueError(f"{record_name} is a quick run: its times mean nothing, run without --quick")
    write_between_markers(docs, record.machine.device, markdown(record, record_name))
    write_between_markers(readme, record.machine.device, summary(record, record_name))
    if drop_in_pairs(record):
        write_between_markers(drop_in, DROP_IN, drop_in_markdown(record, record_name))
        write_between_markers(readme, DROP_IN, drop_in_summary(record, record_name))
