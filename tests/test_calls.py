"""The calls that tests/test_gpu.py makes of every op, made on a CPU, so that only what a GPU does is left to find there.

By the CPU's kernels, and in a process of their own by those of a GPU: Triton's interpreted, CUDA's emulated.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastppo.ops import _backends, use_backend
from tests.calls import CALLS, LARGE, assert_as_exact, bad_inputs, make_inputs

ROOT = Path(__file__).resolve().parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def kernels(request, monkeypatch):
    if INTERPRETED:
        request.getfixturevalue("cuda_kernels_on_the_cpu")
        of_a_gpu = {op: backends[1:] for op, backends in _backends.FAST_BACKENDS.items()}
        monkeypatch.setattr(_backends, "FAST_BACKENDS", of_a_gpu)


def test_every_op_is_called():
    """That has kernels for a GPU."""
    ops = {op for op, backends in _backends.FAST_BACKENDS.items() if set(backends) - {"cpu"}}
    assert {name.split(":")[0] for name in CALLS} == ops
    assert set(LARGE) == ops - {"linear_ppo_loss"}, "whose tiles are linear_token_logprobs'"


@pytest.mark.parametrize("call", CALLS)
def test_calls_agree_with_the_references(call):
    found = CALLS[call](make_inputs("cpu"))
    with use_backend("reference"):
        expected = CALLS[call](make_inputs("cpu"))
    assert all(x.isfinite().all() for x in found)
    assert_as_exact(call, found, expected)


@pytest.mark.skipif(INTERPRETED, reason="what the calls are says nothing of the kernels")
@pytest.mark.parametrize("call", CALLS)
def test_calls_depend_on_their_inputs(call):
    one, other = (CALLS[call](make_inputs("cpu", seed)) for seed in (0, 1))
    assert not any(a.equal(b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("op", LARGE)
def test_the_last_places_of_larger_tensors(op):
    LARGE[op].check(1 << 14, "cpu")


@pytest.mark.skipif(not INTERPRETED, reason="the CPU's kernels raise")
def test_bad_inputs():
    bad_inputs("cpu")


@pytest.mark.skipif(INTERPRETED, reason="is what runs")
def test_the_kernels_of_a_gpu():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "FASTPPO_TEST_BACKEND": "triton"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::RuntimeWarning",
        "-n0",
        __file__,
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]
