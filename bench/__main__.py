"""`python -m fastppo.bench`: measure every op, print the table, keep the record."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastppo.bench import floors, memory, peers, record, report
from fastppo.bench.catalog import OPS, check_op, load_cases, ops_on
from fastppo.bench.floors import Ceilings
from fastppo.bench.harness import ALL, Case, Row, Schedule, describe, fill_ratios, make_inputs, measure, prepared

ROUNDS, QUICK_ROUNDS = 20, 3
SECONDS = 0.5  # that a case's rounds take at least
TURN_SECONDS = 0.005  # of calls in a provider's turn
# That a provider's turns on a case may take: a GPU is lent for minutes, and some calls take seconds.
PROVIDER_SECONDS = {"cpu": 5.0, "cuda": 4.0}
TABLE_WIDTH = 190  # where the output is no terminal
DOCS = record.ROOT / "docs" / "performance.md"
README = record.ROOT / "README.md"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fastppo.bench", description=__doc__)
    parser.add_argument("--op", action="append", metavar="NAME", help=f"only this op; repeatable ({', '.join(OPS)})")
    parser.add_argument(
        "--against",
        type=lambda names: names.split(","),
        metavar="NAMES",
        help=f"compare only with these, e.g. eager,trl; of {', '.join((peers.EAGER, peers.COMPILED, *peers.PACKAGES))}",
    )
    parser.add_argument("--quick", action="store_true", help="small inputs, few rounds: correctness in seconds")
    parser.add_argument("--rounds", type=int, metavar="N", help=f"turns of each provider (default {ROUNDS})")
    parser.add_argument("--check", action="store_true", help="exit 1 and name the rows below their target")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the record; a folder gets <machine>-<date>.json"
    )
    parser.add_argument(
        "--write-docs",
        type=Path,
        metavar="FILE",
        help="only write docs/performance.md and the README's figures from a record",
    )
    options = parser.parse_args(argv)
    try:
        check_options(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def check_options(options: argparse.Namespace) -> None:
    for op in options.op or ():
        check_op(op, options.device)
    peers.check(options.against or ())
    if options.rounds is not None and options.rounds < 1:
        raise ValueError(f"--rounds is {options.rounds}, expected at least 1")
    if options.quick and options.check:
        raise ValueError(
            "--check compares full sizes with their targets: drop --quick (a wrong result fails either way)"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise ValueError(
            f"--device cuda: this torch ({torch.__version__}, {built}) sees no CUDA device here; use --device cpu"
        )
    if options.json and not (options.json.is_dir() or options.json.parent.is_dir()):
        raise ValueError(f"--json: there is no folder {options.json.parent}")


def all_cases(
    ops: list[str], quick: bool, device: str, against: list[str] | None
) -> Iterator[tuple[str, int, Case | Row]]:
    """(op, index within the op, case) of every case; a row with the reason for an op whose cases do not load."""
    for op in ops:
        try:
            cases = load_cases(op, quick, device)
        except Exception as error:
            yield op, 0, Row(op, ALL, ALL, "raised", f"its cases do not load: {describe(error)}")
            continue
        yield from ((op, index, narrowed(case, quick, against)) for index, case in enumerate(cases))


def narrowed(case: Case, quick: bool, against: list[str] | None) -> Case:
    """With the providers that are asked for; nothing is learned from compiling a quick case that no one asked for."""
    if against is None:
        kept = {name for name in case.providers if name != peers.COMPILED or not quick}
    else:
        kept = {peers.OURS, *against}
    return replace(case, providers={name: run for name, run in case.providers.items() if name in kept})


def fill_peaks(rows: dict[str, Row], case: Case, index: int, device: torch.device) -> None:
    """Peak memory of every provider that is right: on a GPU here, else each in a process of its own, where the case promises something."""
    if device.type == "cpu" and case.target.memory_share is None:
        return
    for provider, row in rows.items():
        if row.status == "ok":
            try:
                row.peak_bytes = (
                    memory.cuda_peak(case.providers[provider], prepared(case, provider, make_inputs(case, device)))
                    if device.type == "cuda"
                    else memory.measure_peak(case.op, index, provider)
                )
            except (memory.CannotMeasure, torch.OutOfMemoryError) as error:
                row.peak_reason = str(error)


def run(options: argparse.Namespace, console: Console) -> record.Record:
    """Measures what the options ask for."""
    device = torch.device(options.device)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    most = PROVIDER_SECONDS[device.type]
    schedule = Schedule(rounds) if options.quick else Schedule(rounds, SECONDS, TURN_SECONDS, most)
    ops = list(dict.fromkeys(options.op or ops_on(device.type)))
    cases = list(all_cases(ops, options.quick, device.type, options.against))
    if not options.against and (left := peers.left_out(device.type)):
        console.print(f"installed, but with nothing for a {device.type} device: {', '.join(left)}")
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("ceilings", total=len(cases) * rounds)
        ceilings = floors.ceilings(device, rounds)
        for done, (_, index, case) in enumerate(cases):
            rows += measure_one(case, index, device, schedule, ceilings, ticker(progress, bar, case, done, rounds))
            progress.update(bar, completed=(done + 1) * rounds)
    return record.Record(
        machine=record.this_machine(device, floors.cache_bytes(device), ceilings),
        versions=record.package_versions(),
        revision=record.git_revision(),
        date=record.now(),
        quick=options.quick,
        rounds=rounds,
        rows=rows,
    )


def ticker(progress: Progress, bar: int, case: Case | Row, done: int, rounds: int) -> Callable[[], None]:
    """Advances the bar by one round, at most by the rounds of its case."""
    progress.update(bar, description=f"{case.op} {case.name if isinstance(case, Case) else ''}")
    limit = (done + 1) * rounds

    def tick() -> None:
        progress.update(bar, completed=min(limit, progress.tasks[0].completed + 1))

    return tick


def measure_one(
    case: Case | Row,
    index: int,
    device: torch.device,
    schedule: Schedule,
    ceilings: Ceilings,
    tick: Callable[[], None],
) -> list[Row]:
    if isinstance(case, Row):
        return [case]
    rows = measure(case, device, schedule, ceilings, tick)
    fill_peaks(rows, case, index, device)
    fill_ratios(rows, case.target)
    return list(rows.values())


def write_docs(file: Path) -> None:
    file = file.resolve()
    name = str(file.relative_to(record.ROOT)) if file.is_relative_to(record.ROOT) else file.name
    report.write_docs(record.load(file), name, DOCS, README)
    print(f"wrote {DOCS} and {README}")


def finish(options: argparse.Namespace, result: record.Record) -> int:
    """Prints the table and what is wrong, saves the record; 1 where a row of ours or of eager failed or, with --check, missed a target."""
    out = Console()
    if not out.is_terminal:
        out = Console(width=TABLE_WIDTH)
    out.print(report.terminal_table(result))
    if options.json:
        print(f"record: {record.save(result, options.json)}")
    failed, of_peers = report.failures(result.rows)
    short = report.below_target(result.rows)
    for line in of_peers:
        print(f"peer failed: {line}", file=sys.stderr)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    for line in short:
        print(f"below target: {line}", file=sys.stderr)
    return 1 if failed or (options.check and short) else 0


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.write_docs:
        try:
            write_docs(options.write_docs)
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    return finish(options, run(options, Console(stderr=True)))


if __name__ == "__main__":
    sys.exit(main())
