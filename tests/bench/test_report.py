"""The best peer of a row: the fastest of the others that gave right results, and how far ahead of it we are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastppo.bench import __main__ as cli
from fastppo.bench import report
from fastppo.bench.harness import Row
from fastppo.bench.peers import SEPARATE
from tests.bench.toys import a_record, timed


def rows(**seconds: float) -> list[Row]:
    """Of one case: ours takes a second, and each other as many as are given."""
    others = [timed(name, median, median, median) for name, median in seconds.items()]
    return [timed("fastppo", 1.0, 1.0, 1.0), *others]


def test_the_fastest_of_the_others_is_the_best_peer():
    found = rows(eager=4.0, compile=2.0, cce=3.0)
    assert report.best_peer(found[0], found) == ("compile", 2.0)
    assert report.best_peer(found[1], found) is None, "of our rows alone"


def test_who_is_wrong_is_no_peer_nor_are_we_nor_another_case():
    found = rows(eager=4.0)
    found += [Row("gae", "[256, 1024]", "trl", "wrong", median_s=None), timed(SEPARATE, 0.1, 0.1, 0.1)]
    found += [timed("verl", 0.1, 0.1, 0.1, case="another"), timed("verl", 0.1, 0.1, 0.1, op="another")]
    assert report.best_peer(found[0], found) == ("eager", 4.0)
    alone = rows()
    assert report.best_peer(alone[0], alone) is None
    assert report.best_peer(replace(found[0], status="wrong"), found) is None


def test_calls_are_compared_with_calls():
    """Where one of the two is the replay of a graph, as for the speed-up."""
    found = [replace(row, called_s=2 * row.median_s) for row in rows(eager=3.0)]
    found[0].graph, found[0].called_s = True, 5.0
    assert report.best_peer(found[0], found) == ("eager", 1.2)


@pytest.mark.parametrize(("seconds", "lines"), [(0.96, 1), (0.97, 0), (1.5, 0)])
def test_who_is_behind_is_listed(seconds, lines):
    found = rows(eager=4.0, cce=seconds)
    assert len(report.behind(found)) == lines
    page = report.markdown(a_record(rows=found), "r.json")
    assert f"| {seconds:.2f}x cce |" in page
    line = f"- gae [256, 1024]: {seconds:.2f}x the speed of cce"
    assert (line in page) == bool(lines) != ("None is below 0.97x the speed of its best peer." in page)


@pytest.mark.parametrize("quick", [False, True])
def test_the_command_names_who_is_behind(monkeypatch, capsys, quick):
    """Not in a quick run, whose times mean nothing."""
    options = cli.parser().parse_args([])
    cli.finish(options, a_record(rows=rows(cce=0.5), quick=quick))
    out, err = capsys.readouterr()
    assert "best peer" in out and "0.50x cce" in out
    assert ("behind the best peer: gae [256, 1024]: 0.50x the speed of cce" in err) is not quick
