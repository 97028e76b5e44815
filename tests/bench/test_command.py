"""The command line: what it asks for, what it refuses, what it writes, and its exit status."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys

import pytest
import torch

from fastppo import native
from fastppo.bench import __main__ as cli
from fastppo.bench import catalog, floors, peers, record, run
from fastppo.bench.setting import Setting, parse_sizes
from tests.bench.toys import CEILINGS, toy_case


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "gea"], "unknown op 'gea', did you mean 'gae'?"),
        (["--rounds", "0"], "--rounds is 0, expected at least 1"),
        (["--quick", "--check"], "drop --quick"),
        (["--op", "gae", "--sizes", "8x8", "--check"], "drop --sizes"),
        (["--device", "cuda"], "sees no CUDA device here"),
        (["--json", "no/such/folder/r.json"], "--json: there is no folder no/such/folder"),
        (["--csv", "no/such/folder/r.csv"], "--csv: there is no folder no/such/folder"),
        (["--check", "no/such/targets.toml"], "no/such/targets.toml"),
        (["--sizes", "8x8"], "give exactly one --op"),
        (["--isa", "avx2", "--device", "cuda"], "--isa is of CPU kernels: drop --device cuda"),
        (["--isa", "avx2"], "--isa avx2: fastppo's kernels here are plain"),
        (["--op", "gae", "--sizes", "8"], "'8' is no size of gae, expected BxT"),
        (["--op", "gae", "--sizes", "8x0"], "'8x0' is no size of gae"),
        (["--op", "rollout", "--sizes", "8"], "rollout has no sizes to choose"),
        (["--op", "gae", "--dtype", "bf16"], "gae comes in one type only"),
        (["--compare", "no/a.json", "no/b.json"], "no/a.json"),
    ],
)
def test_usage_errors_name_the_cause(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(native, "cpu_isa", lambda: "plain")
    monkeypatch.setattr(cli.isa, "start_again", lambda isa, arguments: None)
    assert cli.main(arguments) == 2 and message in capsys.readouterr().err


def planned(*arguments: str) -> run.Plan:
    return cli.plan(cli.parser().parse_args(arguments))


def test_no_arguments_measure_everything_on_the_device_at_hand(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = planned()
    assert plan.ops == catalog.OPS and plan.setting == Setting("cpu") and plan.targets is not None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plan = planned()
    assert plan.ops == catalog.ops_on("cuda") and plan.setting.on_gpu


def test_sizes_and_type_make_the_cases():
    plan = planned("--op", "token_logprobs", "--sizes", "8x100, 4x50", "--dtype", "bf16", "--device", "cpu")
    assert plan.setting.sizes == ((8, 100), (4, 50)) and plan.targets is None
    names = [job.case.name for job in run.jobs(plan)]
    assert names == [
        "[8, 100] bf16 forward",
        "[8, 100] bf16 forward + backward, with entropy",
        "[4, 50] bf16 forward",
        "[4, 50] bf16 forward + backward, with entropy",
    ]


def test_a_type_alone_means_the_ops_that_have_it():
    ops = planned("--dtype", "fp16", "--device", "cpu").ops
    assert "token_logprobs" in ops and "gae" not in ops
    assert all(case.dtype == "fp16" for op in ops for case in catalog.load_cases(op, Setting(dtype="fp16", quick=True)))


@pytest.mark.parametrize("op", catalog.OPS)
def test_every_op_takes_the_sizes_it_names(op):
    names = catalog.size_names(op)
    if names:
        sizes = parse_sizes("x".join(["16"] * len(names)), op, names)
        cases = catalog.load_cases(op, Setting(sizes=sizes))
        assert cases and all(case.largest and "16" in case.name for case in cases)


def test_a_size_beyond_the_memory_is_a_row_that_says_so(capsys, tmp_path):
    file = tmp_path / "r.json"
    command = ["--op", "masked_whiten", "--sizes", "900000x9000000", "--rounds", "1", "--device", "cpu"]
    assert cli.main([*command, "--json", str(file)]) == 0, "no failure of ours"
    rows = record.load(file).rows
    assert {row.status for row in rows} == {"skipped"}
    assert "GB with its fp64 reference" in rows[0].reason and "are free" in rows[0].reason


def test_quick_run_of_one_op(tmp_path, capsys):
    files = {"--json": tmp_path / "r.json", "--csv": tmp_path / "r.csv"}
    arguments = ["--op", "token_logprobs", "--against", "eager", "--quick", "--rounds", "2"]
    assert cli.main(arguments + [str(part) for pair in files.items() for part in pair]) == 0
    result = record.load(files["--json"])
    assert result.quick and result.rounds == 2 and result.machine.copy_bandwidth > 0
    assert result.versions["torch"] == torch.__version__
    assert [row.provider for row in result.rows] == ["fastppo", "eager"] * 3
    assert all(row.status == "ok" and row.median_s > 0 and row.error is not None for row in result.rows)
    assert "[32, 4000] bf16 forward" in capsys.readouterr().out
    lines = list(csv.DictReader(files["--csv"].open()))
    assert [float(line["median_s"]) for line in lines] == [row.median_s for row in result.rows]
    assert lines[1]["speedup"] == ""


@pytest.mark.parametrize(
    ("arguments", "multiplied"),
    [(["gae"], []), (["batch_invariant_linear"], ["fp32"]), (["batch_invariant_linear", "--dtype", "bf16"], ["bf16"])],
)
def test_only_the_types_that_cases_multiply_in_get_a_rate(monkeypatch, tmp_path, arguments, multiplied):
    """A square product in bf16 takes an AVX2 processor seconds."""
    asked = []
    monkeypatch.setattr(floors, "matmul_rate", lambda device, dtype, rounds: asked.append(dtype) or 1e11)
    monkeypatch.setattr(floors, "copy_bandwidth", lambda device, rounds: 1e10)
    file = tmp_path / "r.json"
    assert cli.main(["--op", *arguments, "--quick", "--rounds", "1", "--device", "cpu", "--json", str(file)]) == 0
    assert asked == multiplied and list(record.load(file).machine.matmul_rates) == multiplied


@pytest.fixture
def one_toy(monkeypatch):
    """`gae` is one small case, of which no other process measures a peak."""
    monkeypatch.setattr(floors, "cache_bytes", lambda device: 6000)
    monkeypatch.setattr(floors, "ceilings", lambda device, rounds, dtypes: CEILINGS)
    monkeypatch.setattr(run, "load_cases", lambda op, setting: [toy_case(op="gae", name="[256, 1024]")])
    monkeypatch.setattr(run, "fill_cpu_peaks", lambda rows, job, process: None)
    monkeypatch.setattr(peers, "installed", dict)


def test_check_sets_the_exit_status(one_toy, capsys, tmp_path):
    file = tmp_path / "targets.toml"
    command = ["--op", "gae", "--rounds", "1", "--device", "cpu"]
    assert cli.main(command) == 0
    file.write_text('[cpu.gae]\n"[256, 1024]" = { speedup = 1e6 }\n')
    assert cli.main([*command, "--check", str(file)]) == 1
    assert "below target: gae [256, 1024]: " in capsys.readouterr().err
    file.write_text('[cpu.gae]\n"[256, 1024]" = { speedup = 1e-6 }\n')
    assert cli.main([*command, "--check", str(file)]) == 0


def test_an_instruction_set_starts_the_bench_again_with_every_library_held_to_it(monkeypatch):
    for name in cli.isa.VARIABLES["avx2"]:
        monkeypatch.delenv(name, raising=False)
    started = []

    def execve(path, command, environ):
        started.append((path, command, environ))
        raise SystemExit

    monkeypatch.setattr(os, "execve", execve)
    with pytest.raises(SystemExit):
        cli.main(["--isa", "avx2", "--op", "gae"])
    ((path, command, environ),) = started
    assert path == sys.executable and command[1:] == ["-m", "fastppo.bench", "--isa", "avx2", "--op", "gae"]
    assert cli.isa.held_to("avx2", environ) and not cli.isa.held_to("avx2", os.environ)
    assert environ["TORCHINDUCTOR_CACHE_DIR"].endswith("avx2"), "compiled programs of two instruction sets do not mix"


def test_cases_that_do_not_load_are_a_failure_with_its_reason(one_toy, monkeypatch, capsys):
    monkeypatch.setattr(run, "load_cases", lambda op, setting: 1 / 0)
    assert cli.main(["--op", "gae", "--rounds", "1", "--device", "cpu"]) == 1
    assert "failed: gae all, all: raised: its cases do not load: ZeroDivisionError" in capsys.readouterr().err


def test_the_gpu_script_says_when_there_is_no_gpu(tmp_path):
    """And leaves nothing behind."""
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    folder = tmp_path / "results"
    command = [record.ROOT / "bench" / "gpu_record.sh", folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "sees no CUDA device here" in done.stderr
    assert not folder.exists()


A_PYTHON_WITH_A_GPU = """#!/usr/bin/env bash
case "$*" in
  *get_device_capability*) echo 90 ;;
  *"pip install"*) echo "built for $FASTPPO_CUDA_ARCHS" ;;
  *"fastppo info"*) ;;
  *ops_on*) echo --op gae ;;
  *fastppo.bench*) echo a table; exit 3 ;;
  *"-k sanitizer"*) exit 124 ;;
esac
"""


def test_the_gpu_script_goes_on_after_a_part_that_fails(tmp_path):
    """Here in the hands of a Python and an nvidia-smi that only pretend."""
    for name, text in (("python", A_PYTHON_WITH_A_GPU), ("nvidia-smi", "#!/bin/sh\necho a GPU\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PYTHON": str(tmp_path / "python"), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    folder = tmp_path / "results"
    done = subprocess.run(
        [record.ROOT / "bench" / "gpu_record.sh", folder], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "failed: bench (exit 3)",
        "failed: rollout (exit 3)",
        "failed: ppo_step (exit 3)",
        "failed: sanitizer (ran out of its 40 s)",
    ]
    logs = {path.name: path.read_text() for path in folder.iterdir()}
    assert logs["gpu-device.log"] == "a GPU\n" and logs["gpu-build.log"] == "built for 90\n"
    assert logs["gpu-bench.log"] == "a table\n" and {"gpu-tests.log", "gpu-sanitizer.log"} <= logs.keys()


def test_the_parts_of_the_gpu_script_take_nine_minutes_at_most():
    text = (record.ROOT / "bench" / "gpu_record.sh").read_text()
    seconds = [int(share) for share in re.findall(r"^part \w+ (\d+) ", text, re.MULTILINE)]
    killed_after = int(re.search(r"--kill-after=(\d+)", text)[1])
    assert len(seconds) == 8 and sum(seconds) + killed_after * len(seconds) <= 540


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "plan", lambda options: int("seven"))
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["--op", "gae"])
