"""Pictures: each is written for what the record has, and none for what it has not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastppo.bench import __main__ as cli
from fastppo.bench import plots, record
from tests.bench.test_scaling import curve_rows
from tests.bench.toys import a_record, timed

pytest.importorskip("matplotlib")
PNG = b"\x89PNG\r\n"


def whole_record() -> record.Record:
    """Every picture's rows: what moves memory, a product, peers, curves with peaks over N."""
    timed_rows = a_record().rows[:2] + [
        timed("trl", 1e-2, 2e-2, 3e-2, speedup=2.5),
        timed("mine", 1, 1, 1, speedup=0.1),
    ]
    product = replace(timed_rows[0], op="linear_token_logprobs", case="8 tokens", floor_flops=80000, gflop_per_s=8.0)
    step = replace(
        timed_rows[0],
        op="ppo_step",
        phase_s={"sampling": 1e-3, "update": 2e-3},
        phase_flops={"sampling": 10**7, "update": 10**8},
    )
    curves = [replace(row, op="linear_token_logprobs", axis="N") for row in curve_rows()]
    return a_record(rows=[*timed_rows, product, step, a_record().rows[2]], scaling=curves)


def test_every_picture_is_written(tmp_path):
    files = plots.draw(whole_record(), tmp_path / "new" / "folder")
    assert [file.name for file in files] == [f"cpu-{name}.png" for name in plots.PICTURES]
    assert all(file.read_bytes().startswith(PNG) for file in files)


def test_a_record_without_rows_for_a_picture_has_none(tmp_path):
    assert [file.name for file in plots.draw(a_record(), tmp_path)] == ["cpu-roofline.png", "cpu-speedup.png"]
    assert plots.draw(a_record(rows=[]), tmp_path) == []


def test_bars_of_phases_end_with_ours_and_the_floor():
    """The floor is the flops of each phase at the machine's rate, 1e11 a second here."""
    ours = next(row for row in whole_record().rows if row.phase_s)
    others = [replace(ours, provider=name, median_s=seconds) for name, seconds in (("eager", 2.0), ("trl", 3.0))]
    bars = plots.phase_bars([ours, *others], whole_record())
    assert [name for name, _ in bars] == ["trl", "eager", "fastppo", plots.FLOOR]
    assert bars[-1][1] == {"sampling": 1e-4, "update": 1e-3}


def test_the_page_shows_the_phases_of_a_record_that_has_them():
    page = cli.DOCS.read_text()
    assert (cli.DOCS.parent / "cpu-phases.png").read_bytes().startswith(PNG)
    shown = page.split("](cpu-phases.png)")[1]
    rows = record.load(record.ROOT / shown.split("Record: `")[1].split("`")[0]).rows
    found = {row.provider for row in rows if row.op == "ppo_step" and row.phase_s}
    assert {"fastppo", "eager", "trl"} <= found


def test_pictures_come_from_a_record_too(tmp_path, monkeypatch, capsys):
    """--write-docs FILE --plot DIR."""
    pages = []
    monkeypatch.setattr(cli.report, "write_docs", lambda *arguments: pages.append(arguments))
    file = record.save(whole_record(), tmp_path / "r.json")
    assert cli.main(["--write-docs", str(file), "--plot", str(tmp_path)]) == 0
    assert pages and (tmp_path / "cpu-speedup.png").exists() and "cpu-scaling.png" in capsys.readouterr().out


def test_without_matplotlib_it_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert cli.main(["--quick", "--plot", str(tmp_path)]) == 2
    assert "pip install fastppo[plot]" in capsys.readouterr().err
