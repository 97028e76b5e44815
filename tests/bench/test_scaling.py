"""Scaling: which sizes are measured, and the exponent that fits them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastppo.bench import harness, memory, report, run, scaling
from fastppo.bench.catalog import OPS, case_file
from fastppo.bench.floors import Ceilings
from fastppo.bench.harness import Row, Schedule
from fastppo.bench.setting import Setting
from tests.bench.toys import a_record, toy_case
from tests.tolerance import assert_rounds_to

CPU = torch.device("cpu")


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_exponent_of_a_power_is_its_power(power):
    found = scaling.fit_exponent((n, 3e-6 * n**power) for n in (100, 200, 400, 800))
    assert_rounds_to(torch.tensor(1 + found, dtype=torch.float64), 1 + power)


def test_two_points_are_no_curve():
    assert scaling.fit_exponent([(100, 1.0), (200, 2.0)]) is None
    assert scaling.fit_exponent([(100, 1.0)] * 3) is None


def test_lengths_double_up_to_what_the_case_file_says():
    assert list(scaling.sizes("gae", "cpu")) == [("T", t, (256, t)) for t in (512, 1024, 2048, 4096)]
    assert max(length for _, length, _ in scaling.sizes("gae", "cuda")) == 32768, "a GPU's usual size is long enough"
    over_n = [size for axis, _, size in scaling.sizes("linear_token_logprobs", "cpu")]
    assert over_n == [(n, 32, 8000) for n in (1024, 2048, 4096, 8192)], "of a smaller head than the usual one"
    over_v = [size for axis, _, size in scaling.sizes("token_logprobs", "cpu") if axis == "V"]
    assert over_v == [(512, v) for v in (8000, 16000, 32000, 64000)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_scaled_op_has_its_cases(op, device):
    if hasattr(case_file(op), "SCALED"):
        points = list(scaling.points(op, device))
        assert len(points) == len(scaling.SHARES) * len(case_file(op).SCALED)
        assert all(point.case.providers.keys() == {"fastppo", "eager"} for point in points)


@pytest.mark.parametrize("op", ["gae", "token_logprobs"])
def test_the_shortest_of_a_curve_is_compared_with_fp64(op):
    """The same code computes the others, whose truth would take longer than all that is timed."""
    compared = {}
    for point in scaling.points(op, "cpu"):
        compared.setdefault(point.axis, []).append(point.case.needs_truth)
    assert compared == {axis: [True, False, False, False] for axis in case_file(op).SCALED}


def test_no_truth_is_computed_that_nothing_is_compared_with():
    def exact(x):
        raise AssertionError("computed")

    case = replace(toy_case(), exact=exact)
    rows = harness.measure(replace(case, unchecked=tuple(case.providers)), CPU, Schedule(1), Ceilings(1e10))
    assert {(row.status, row.error) for row in rows.values()} == {("ok", None)}
    failed = harness.measure(case, CPU, Schedule(1), Ceilings(1e10))
    assert {row.status for row in failed.values()} == {"raised"}


def curve_rows() -> list[Row]:
    """Ours is linear, eager is quadratic and fails at its longest."""
    rows = []
    for length in (100, 200, 400, 800):
        for provider, power in (("fastppo", 1), ("eager", 2)):
            row = Row("gae", f"[8, {length}]", provider, "ok", median_s=1e-6 * length**power, axis="T", length=length)
            row.peak_bytes = length * 1000
            rows.append(row)
    rows[-1].status = "raised"
    return rows


def test_curves_keep_what_was_measured():
    ours, eager = scaling.curves(curve_rows())
    assert ours.exponent == pytest.approx(1) and eager.exponent == pytest.approx(2)
    assert [row.length for row in eager.rows] == [100, 200, 400]


def test_the_table_has_a_line_for_each_curve():
    lines = report.scaling_lines(a_record(scaling=curve_rows()))
    assert lines[0] == ("gae", "T", "fastppo", "100 - 800", "100 µs - 800 µs", "0 MB - 1 MB", "1.00")
    assert lines[1][-1] == "2.00"
    assert f"| {' | '.join(lines[0])} |" in report.markdown(a_record(scaling=curve_rows()), "r.json")


def test_scaled_cases_go_into_their_own_part_of_the_record(monkeypatch):
    """Targets are for the usual cases; a point knows its place on its curve."""
    plan = run.Plan(("gae",), Setting(), rounds=1, scaling=True)
    job = run.Job(toy_case(), Setting(), 0, "T", 512)
    rows = run.measure_job(job, plan, Ceilings(1e10), memory.PeakProcess(), lambda: None)
    assert {(row.axis, row.length) for row in rows} == {("T", 512)}
    assert not any(row.has_target for row in rows)
    jobs = list(run.jobs(plan))
    assert [(job.axis, job.length) for job in jobs] == [(None, None)] * 2 + [("T", t) for t in (512, 1024, 2048, 4096)]
