"""--compare: a ratio for every row, and a word where the change exceeds both spreads."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from fastppo.bench import __main__ as cli
from fastppo.bench import compare, record
from tests.bench.toys import a_record, timed


@pytest.mark.parametrize(
    ("p20", "median", "p80", "expected"),
    [(1.2, 1.3, 1.4, "slower"), (0.5, 0.6, 0.89, "faster"), (1.0, 1.2, 1.4, ""), (0.5, 0.7, 0.91, "")],
)
def test_a_change_counts_beyond_both_spreads(p20, median, p80, expected):
    assert compare.verdict(timed("fastppo", 0.9, 1.0, 1.1), timed("fastppo", p20, median, p80)) == expected


def test_every_row_of_either_record_has_its_line():
    old = a_record()
    slower = timed("fastppo", 1.9e-3, 2e-3, 2.1e-3)
    new = a_record(rows=[slower, replace(old.rows[2], status="ok", median_s=1e-3), timed("trl", 1, 1, 1)])
    lines = [compare.cells(*pair) for pair in compare.pairs(old, new)]
    assert lines == [
        ("gae [256, 1024]", "fastppo", "1 ms", "2 ms", "2.00x", "slower"),
        ("ppo_loss 16 tokens", "fastppo", "", "1 ms", "", "wrong -> ok"),
        ("gae [256, 1024]", "trl", "", "1 s", "", "new"),
        ("gae [256, 1024]", "eager", "50 ms", "", "", "gone"),
    ]


def test_the_command_prints_the_table(tmp_path, capsys):
    files = [str(record.save(a_record(), tmp_path / name)) for name in ("a.json", "b.json")]
    assert cli.main(["--compare", *files]) == 0
    assert "gae [256, 1024]" in capsys.readouterr().out


def test_records_of_two_kinds_of_device_are_refused(tmp_path, capsys):
    on_gpu = a_record(machine=replace(a_record().machine, device="cuda"))
    files = [str(record.save(made, tmp_path / name)) for made, name in ((a_record(), "a"), (on_gpu, "b"))]
    assert cli.main(["--compare", *files]) == 2
    assert "the first record is of a cpu, the second of a cuda device" in capsys.readouterr().err


def test_quick_records_say_so():
    table = compare.table(a_record(quick=True), a_record())
    console = Console(width=120)
    with console.capture() as captured:
        console.print(table)
    assert "times mean nothing" in captured.get()
