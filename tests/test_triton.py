"""Triton kernels without a GPU: run by the interpreter against the references, and compiled to cubins without spills."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.registers import ARCHITECTURES, triton_usage
from tests.triton_launches import LAUNCHES

ROOT = Path(__file__).resolve().parents[1]
TESTED_OPS = [
    "token_logprobs",
    "linear_token_logprobs",
    "linear_ppo_loss",
    "decode_attention",
    "batch_invariant_linear",
]


@pytest.mark.slow
@pytest.mark.parametrize("op", TESTED_OPS)
def test_interpreter_agrees_with_the_reference(op):
    """The op's whole test file again, its kernels interpreted: a process of its own, since Triton reads the switch at import."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "FASTPPO_TEST_BACKEND": "triton"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "-n0"]
    done = subprocess.run(
        [*command, f"tests/ops/test_{op}.py"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize(
    "launch", LAUNCHES, ids=[f"{launch[1].strip('_')}-{i // 2}" for i, launch in enumerate(LAUNCHES)]
)
def test_compiles_without_spills(launch, capability, tmp_path, monkeypatch, record_property):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    usage = triton_usage(launch, capability, tmp_path)
    record_property("registers", usage.registers)
    assert usage.local == 0, "spills"
    assert usage.shared <= ARCHITECTURES[capability]
