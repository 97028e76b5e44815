"""`python -m fastppo.bench`: measure every op, print the table, keep the record."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from rich.console import Console

from fastppo.bench import compare, isa, peers, plots, record, report, targets
from fastppo.bench.catalog import OPS, check_op, ops_on, size_names, takes_dtype
from fastppo.bench.run import Plan, run
from fastppo.bench.setting import DTYPES, Setting, parse_sizes
from fastppo.errors import is_users

ROUNDS, QUICK_ROUNDS = 20, 3
TABLE_WIDTH = 190  # where the output is no terminal
DOCS = record.ROOT / "docs" / "performance.md"
README = record.ROOT / "README.md"
DROP_IN = record.ROOT / "docs" / "drop-in.md"


def names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastppo.bench", description=__doc__)
    add = parser.add_argument
    what = parser.add_argument_group("what to measure")
    what.add_argument("--op", action="append", metavar="NAME", help=f"only this op; repeatable ({', '.join(OPS)})")
    known = ", ".join((peers.EAGER, peers.COMPILED, *peers.PACKAGES))
    what.add_argument("--against", type=names, metavar="NAMES", help=f"only with these, e.g. eager,trl; of {known}")
    what.add_argument("--sizes", metavar="SIZES", help="with one --op: sizes for it, e.g. 512x32000,1024x50257")
    what.add_argument("--dtype", choices=tuple(DTYPES), help="type of the logits, heads, layers or caches")
    what.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    what.add_argument("--isa", choices=tuple(isa.VARIABLES), help="hold our kernels, torch, oneDNN and MKL to it")
    what.add_argument("--quick", action="store_true", help="small inputs, few rounds: correctness in seconds")
    what.add_argument("--rounds", type=int, metavar="N", help=f"turns of each provider (default {ROUNDS})")
    add("--json", type=Path, metavar="FILE", help="write the record; a folder gets <machine>-<date>.json")
    add("--csv", type=Path, metavar="FILE", help="write the rows")
    add("--plot", type=Path, metavar="DIR", help="draw the pictures, with --write-docs those of its record")
    check = "exit 1 and name the rows below their target, which stand in FILE (default: the project's own)"
    add("--check", type=Path, metavar="FILE", nargs="?", const=targets.DEFAULT, help=check)
    instead = parser.add_argument_group("instead of measuring")
    instead.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="what changed between two records")
    docs = "write docs/performance.md and the figures of docs/drop-in.md and the README from a record"
    instead.add_argument("--write-docs", type=Path, metavar="FILE", help=docs)
    return parser


def check_options(options: argparse.Namespace) -> None:
    """ValueError that names the option which cannot be."""
    if options.isa and options.device == "cuda":
        raise ValueError("--isa is of CPU kernels: drop --device cuda")
    if options.isa:
        isa.check(options.isa)
    if options.device == "cuda" and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise ValueError(
            f"--device cuda: this torch ({torch.__version__}, {built}) sees no CUDA device here; use --device cpu"
        )
    if options.rounds is not None and options.rounds < 1:
        raise ValueError(f"--rounds is {options.rounds}, expected at least 1")
    unusual = [name for name in ("quick", "sizes", "dtype") if getattr(options, name)]
    if options.check and unusual:
        raise ValueError(
            f"--check compares the usual cases with their targets: drop --{unusual[0]} (a wrong result fails either way)"
        )
    if options.plot:
        plots.require_matplotlib()
    for name in ("json", "csv"):
        path = getattr(options, name)
        if path and not (path.is_dir() or path.parent.is_dir()):
            raise ValueError(f"--{name}: there is no folder {path.parent}")


def plan(options: argparse.Namespace) -> Plan:
    """What the options ask for; ValueError names the one that cannot be."""
    device = options.device or ("cuda" if torch.cuda.is_available() and not options.isa else "cpu")
    for op in options.op or ():
        check_op(op, device)
    peers.check(options.against or ())
    ops = tuple(dict.fromkeys(options.op or ops_on(device)))
    setting = Setting(device, options.quick, read_sizes(options), options.dtype)
    if options.dtype:
        ops = typed(ops, asked=bool(options.op))
    usual = not (setting.quick or setting.sizes or setting.dtype)
    promised = targets.load(options.check or targets.DEFAULT, device) if usual else None
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    return Plan(ops, setting, rounds, options.against, promised, scaling=usual)


def read_sizes(options: argparse.Namespace) -> tuple[tuple[int, ...], ...] | None:
    if options.sizes is None:
        return None
    if len(options.op or ()) != 1:
        raise ValueError("--sizes are those of one op: give exactly one --op")
    return parse_sizes(options.sizes, options.op[0], size_names(options.op[0]))


def typed(ops: tuple[str, ...], asked: bool) -> tuple[str, ...]:
    """Those of `ops` that come in several types; ValueError where another one was asked for by name."""
    kept = tuple(op for op in ops if takes_dtype(op))
    if asked and kept != ops:
        raise ValueError(f"--dtype: {next(op for op in ops if op not in kept)} comes in one type only")
    return kept


def write_docs(file: Path, pictures: Path | None) -> None:
    file = file.resolve()
    name = str(file.relative_to(record.ROOT)) if file.is_relative_to(record.ROOT) else file.name
    result = record.load(file)
    report.write_docs(result, name, DOCS, README, DROP_IN)
    print(f"wrote {DOCS}, {DROP_IN} and {README}")
    if pictures:
        draw(result, pictures)


def draw(result: record.Record, folder: Path) -> None:
    print(f"pictures: {', '.join(map(str, plots.draw(result, folder)))}")


def console() -> Console:
    out = Console()
    return out if out.is_terminal else Console(width=TABLE_WIDTH)


def finish(options: argparse.Namespace, result: record.Record) -> int:
    """Prints the table and what is wrong, saves the record; 1 where a row of ours or of eager failed or, with --check, missed a target."""
    out = console()
    out.print(report.terminal_table(result))
    if result.scaling:
        out.print(report.scaling_table(result))
    if options.json:
        print(f"record: {record.save(result, options.json)}")
    if options.csv:
        print(f"rows: {record.save_csv(result, options.csv)}")
    if options.plot:
        draw(result, options.plot)
    failed, of_peers = report.failures(result.rows + result.scaling)
    short = report.below_target(result.rows)
    slower = [] if result.quick else report.behind(result.rows)
    for title, lines in (
        ("peer failed", of_peers),
        ("failed", failed),
        ("behind the best peer", slower),
        ("below target", short),
    ):
        for line in lines:
            print(f"{title}: {line}", file=sys.stderr)
    return 1 if failed or (options.check and short) else 0


def show(old: Path, new: Path) -> None:
    console().print(compare.table(record.load(old), record.load(new)))


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(arguments)
    if options.isa and not isa.held_to(options.isa, os.environ):
        isa.start_again(options.isa, arguments)
    try:
        if options.compare or options.write_docs:
            show(*options.compare) if options.compare else write_docs(options.write_docs, options.plot)
            return 0
        check_options(options)
        planned = plan(options)
    except Exception as error:
        if not is_users(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return finish(options, run(planned, Console(stderr=True)))


if __name__ == "__main__":
    sys.exit(main())
