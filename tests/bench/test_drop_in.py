"""Other packages' functions beside ours: each row is right, every replaced function has one, and ratios are over theirs."""

from __future__ import annotations

import importlib
import io
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from rich.console import Console

from fastppo.bench import __main__ as cli
from fastppo.bench import (
    drop_in,
    drop_in_functions,
    drop_in_steps,
    floors,
    harness,
    peers,
    record,
    report,
    run,
    stand_ins,
)
from fastppo.bench.catalog import load_cases
from fastppo.bench.setting import Setting
from fastppo.integrations.patching import Peer
from tests.bench.toys import CEILINGS, a_record, double, timed, toy_case

CPU = torch.device("cpu")
QUICK = Setting(quick=True)
COMPARISONS = drop_in_functions.comparisons(quick=True)
# What replaces a function, but has no row of its own.
WITHOUT_A_ROW = {
    "trl": {
        "_use_triton": "tells which positions are scored: a part of the GRPO step",
    },
    "verl": {
        "linear_cross_entropy": "a Triton kernel, for a GPU",
        "entropy_from_logits_with_chunking": "as entropy_from_logits",
        "masked_mean": "a part of the losses",
        "compute_policy_loss": "as compute_policy_loss_vanilla, which replaces it",
        "agg_loss": "a part of the losses",
        "compute_entropy_loss": "entropy_from_logits and agg_loss",
        "kl_penalty_forward": "a part of kl_penalty",
    },
    "openrlhf": {"RemoteExperienceMaker.get_cumulative_returns": "get_advantages_and_returns without values"},
    "liger": {
        "triton_grpo_loss": "Triton kernels, for a GPU",
        "fused_selective_log_softmax": "a Triton kernel, for a GPU",
        "LigerFusedLinearCrossEntropyFunction.apply": "Triton kernels, for a GPU",
    },
    "torchrl": {
        "td_lambda_return_estimate": "the recursion of generalized_advantage_estimate",
        "vec_td_lambda_return_estimate": "the recursion of vec_generalized_advantage_estimate",
    },
}


def installed(package: str) -> None:
    if package not in peers.installed():
        pytest.skip(f"{package} is not installed")


def checked(case: harness.Case) -> None:
    """Theirs and ours pass the check against fp64; nothing is compiled, which would take seconds and change no number's place."""
    installed(case.baseline)
    inputs = harness.make_inputs(case, CPU)
    with torch.compiler.set_stance("force_eager"):
        exact = case.exact(harness.in_fp64(inputs))
        for provider in (case.baseline, "fastppo"):
            row, _ = harness.check_provider(case, provider, inputs, exact)
            assert row.status == "ok" and row.baseline == case.baseline, row.reason


@pytest.mark.parametrize("one", COMPARISONS, ids=lambda one: f"{one.package} {one.function} {one.size}")
def test_each_function_is_called_as_its_package_does(one):
    checked(drop_in.make_case(one))


@pytest.mark.parametrize("package, make", drop_in_steps.CASES)
def test_a_step_is_right_patched_and_as_it_comes(package, make):
    """And leaves the package as it was."""
    installed(package)
    checked(make(quick=True))
    name = package.replace("-", "_")
    found = vars(importlib.import_module(f"fastppo.integrations.{name}")).values()
    assert not any(peer._swaps for peer in found if isinstance(peer, Peer))


@pytest.mark.parametrize("package", [name for name in peers.DROP_IN if name != "transformers"])
def test_every_replaced_function_has_a_row_or_a_reason(package):
    """By the names that the newest tested version has."""
    module = importlib.import_module(f"fastppo.integrations.{package.replace('-', '_')}")
    (peer,) = (value for value in vars(module).values() if isinstance(value, Peer))
    newest = list(peer._replacements.values())[-1]
    rows = {one.function for one in COMPARISONS if one.package == package}
    for replacement in newest:
        function = replacement.target.partition(":")[2]
        assert function in rows or function in WITHOUT_A_ROW.get(package, {}), replacement.target


def test_a_package_that_is_absent_has_no_case_and_is_said_to_be_left_out(monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda: {"torchrl": peers.PACKAGES["torchrl"]})
    assert {case.baseline for case in load_cases("drop_in", QUICK)} == {"torchrl"}
    monkeypatch.setattr(peers, "installed", dict)
    assert load_cases("drop_in", QUICK) == []
    monkeypatch.setattr(floors, "ceilings", lambda device, rounds, dtypes: CEILINGS)
    monkeypatch.setattr(record, "package_versions", dict)
    said = Console(file=io.StringIO(), width=200)
    assert run.run(run.Plan(("drop_in",), QUICK, rounds=1), said).rows == []
    assert "not installed, so left out of drop_in: trl, verl, openrlhf" in said.file.getvalue()


def test_against_keeps_the_cases_of_the_packages_it_names(monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda: {name: peers.PACKAGES[name] for name in ("verl", "torchrl")})
    jobs = list(run.jobs(run.Plan(("drop_in",), QUICK, rounds=1, against=("torchrl",))))
    assert {tuple(job.case.providers) for job in jobs} == {("fastppo", "torchrl")}
    assert all(load_cases("drop_in", QUICK)[job.index].name == job.case.name for job in jobs)


def test_stand_ins_are_there_for_an_import_alone():
    assert find_spec("a_package_that_is_not_there") is None
    with stand_ins.standing_in(("a_package_that_is_not_there", "torch")):
        from a_package_that_is_not_there.part import something

        assert something is not None and sys.modules["torch"] is torch
    assert find_spec("a_package_that_is_not_there") is None
    assert not [name for name in sys.modules if name.startswith("a_package_that_is_not_there")]


def test_ratios_are_over_the_case_s_own_baseline(monkeypatch):
    monkeypatch.setattr(floors, "cache_bytes", lambda device: 6000)
    providers = {"fastppo": double, "trl": lambda x: {"y": x["x"] + x["x"]}, "eager": double}
    rows = harness.measure(toy_case(baseline="trl", providers=providers, work=None), CPU, harness.Schedule(2), CEILINGS)
    for name, peak in (("fastppo", 20), ("trl", 100), ("eager", 10)):
        rows[name].peak_bytes = peak
    harness.fill_ratios(rows)
    ours, theirs = rows["fastppo"], rows["trl"]
    assert ours.speedup == theirs.median_s / ours.median_s and ours.memory_share == 0.2
    assert theirs.speedup is None and theirs.memory_share is None
    assert ours.floor_bytes is None and ours.gb_per_s is None and ours.copy_share is None


def test_theirs_may_round_more_often_than_ours_and_not_without_end():
    exact = {"y": torch.ones(3, dtype=torch.float64)}
    compare = COMPARISONS[-1].compare
    assert compare({}, {"y": torch.full((3,), 1.0005)}, exact) > harness.ALLOWED_ERROR[torch.float32]
    with pytest.raises(harness.WrongResult):
        compare({}, {"y": torch.full((3,), 1.005)}, exact)


def drop_in_record() -> record.Record:
    """One function that is right, one of which theirs fails."""
    of_trl = {"op": "drop_in", "case": "trl entropy_from_logits [2, 3]", "baseline": "trl"}
    of_verl = {"op": "drop_in", "case": "verl masked_whiten [2]", "baseline": "verl"}
    without = {"floor_bytes": None, "gb_per_s": None, "copy_share": None}
    rows = [
        timed("fastppo", 1e-3, 2e-3, 3e-3, speedup=10.4, memory_share=0.1, peak_bytes=10_000_000, **of_trl, **without),
        timed("trl", 1e-2, 2e-2, 3e-2, peak_bytes=100_000_000, **of_trl, **without),
        timed("fastppo", 1e-3, 2e-3, 3e-3, **of_verl, **without),
        harness.Row(provider="verl", status="raised", reason="RuntimeError: no", **of_verl),
    ]
    return a_record(rows=a_record().rows + rows)


def test_the_tables_say_whose_speed_and_memory(capsys):
    console = Console(width=250)
    console.print(report.terminal_table(drop_in_record()))
    shown = capsys.readouterr().out
    assert "10.40x" in shown and "10.0 MB (10.0% of trl)" in shown
    assert report.failures(drop_in_record().rows)[1] == [
        "drop_in verl masked_whiten [2], verl: raised: RuntimeError: no"
    ]


def test_the_pages_have_a_line_for_each_function():
    page = report.drop_in_markdown(drop_in_record(), "r.json")
    assert (
        "| trl | entropy_from_logits [2, 3] | 20 ms | 2 ms | **10x** | 1.0e-07 | 1.0e-07 | 100.0 MB | 10.0 MB |" in page
    )
    assert "| verl | masked_whiten [2] | raised | 2 ms |  |  | 1.0e-07 |  |  |" in page
    assert "- drop_in verl masked_whiten [2], verl: raised: RuntimeError: no" in page
    summary = report.drop_in_summary(drop_in_record(), "r.json")
    assert "| trl | entropy_from_logits [2, 3] | 10x | 10% |" in summary and "masked_whiten" not in summary
    assert "drop_in" not in report.markdown(drop_in_record(), "r.json")
    assert "entropy_from_logits" not in report.summary(drop_in_record(), "r.json")


def test_a_share_of_hardly_any_memory_is_not_told():
    found = drop_in_record()
    rows = [replace(row, peak_bytes=1_000_000) if row.provider == "trl" else row for row in found.rows]
    assert "| trl | entropy_from_logits [2, 3] | 10x |  |" in report.drop_in_summary(
        replace(found, rows=rows), "r.json"
    )


@pytest.mark.parametrize(("share", "text"), [(1.214, "121%"), (0.0051, "1%"), (0.0049, "under 1%"), (0.0, "under 1%")])
def test_a_share_is_never_nothing(share, text):
    assert report.percent(share) == text


def test_it_has_no_case_on_a_gpu(capsys):
    assert cli.main(["--op", "drop_in", "--device", "cuda"]) == 2
