"""Triton kernels without a GPU: run by the interpreter against the references, and compiled to cubins without spills."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastppo.ops._backends import FAST_BACKENDS

pytest.importorskip("triton")

from tests.kernel_resources import MOST_SHARED, TRITON_LAUNCHES, compile_triton  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TESTED = [f"ops/test_{op}" for op, fast in FAST_BACKENDS.items() if "triton" in fast]
TESTED += ["ops/test_certain_tokens", "rollout/test_fused_decoder", "rollout/test_exact_kernels"]
# What is left out of an op's tests: sizes that say little more than others, and are slow. Heads of 8, 20, 80, 256 and 258 are padded, whole and
# too large; windows of 1 and 513 keys leave splits out and cross one; a block of queries that begins at 60 crosses a page.
INTERPRETED = {
    "ops/test_decode_attention": "not (head_sizes and (cpu-16 or 64 or 128) or long_sequences and (500 or 600) or consecutive and [0-"
    " or not_used and 2147483648 or bits_do_not_depend and dtype2)",
    "ops/test_linear_ppo_loss": "not chunk_boundaries or sequence-2 or everything-70",
    "ops/test_packed_attention": "not (head_sizes and (16 or 64) or windows and (cpu-2] or 1000) or nan_stays and cpu-1 or float64)",
}


@pytest.mark.slow
@pytest.mark.parametrize("path", TESTED)
def test_interpreter_agrees_with_the_reference(path):
    """A whole test file again, its kernels interpreted: a process of its own, since Triton reads the switch at import."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "FASTPPO_TEST_BACKEND": "triton"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "-n0"]
    done = subprocess.run(
        [*command, f"tests/{path}.py", "-k", INTERPRETED.get(path, "")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("capability", MOST_SHARED)
@pytest.mark.parametrize(
    "launch", TRITON_LAUNCHES, ids=[f"{launch[1].strip('_')}-{i // 2}" for i, launch in enumerate(TRITON_LAUNCHES)]
)
def test_compiles_without_spills(launch, capability, tmp_path, monkeypatch):
    """What has not changed since the last run lies compiled in a cache of the checkout."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(ROOT / "build" / "triton"))
    usage = compile_triton(launch, capability, tmp_path)
    print(f"{launch[1]} sm_{capability}: {usage.registers} registers, {usage.shared} bytes of shared memory")
    assert usage.local == 0, "spills"
    assert usage.shared <= MOST_SHARED[capability]
