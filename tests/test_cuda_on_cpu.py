"""CUDA kernels without a GPU: executed on the CPU against the references, checked by sanitizers, and compiled without spills."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastppo import native
from fastppo.ops import _backends, gae, masked_mean, masked_whiten, use_backend
from tests.cuda_on_cpu import build
from tests.kernel_resources import (
    BEGIN,
    CUDA_SOURCES,
    DOCS,
    END,
    MOST_SHARED,
    TRITON_LAUNCHES,
    compile_cuda,
    cuda_kernel_names,
    find_nvcc,
)

ROOT = Path(__file__).resolve().parents[1]
TESTED_OPS = [op for op, fast in _backends.FAST_BACKENDS.items() if "cuda" in fast]
# What of an op's tests AddressSanitizer watches: small cases, few draws, without processes of their own, and of fp16 and bf16, whose
# elements lie alike, bf16 alone.
SANITIZED = "not opcheck and not compiles and not group and not frequencies and not large_vocabulary and not dtype2"

THREADS = 64


def run_tests(*arguments: str, **environment: str) -> None:
    """Those tests in a process of their own; none may fail, and some must have run."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n0", *arguments]
    environment = os.environ | {"FASTPPO_TEST_BACKEND": "cuda"} | environment
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("op", TESTED_OPS)
def test_executed_kernels_agree_with_the_reference(op):
    """The op's whole test files again, its CUDA kernels executed."""
    build.build()
    run_tests(*map(str, sorted((ROOT / "tests" / "ops").glob(f"test_{op}*.py"))))


def sanitizer_environment() -> dict[str, str]:
    # The C++ library too: without it, AddressSanitizer finds no function to throw exceptions with, and ends the process at torch's first.
    names = ("libasan.so", "libstdc++.so.6")
    found = [subprocess.run([build.CXX, f"-print-file-name={name}"], capture_output=True, text=True) for name in names]
    runtimes = [done.stdout.strip() for done in found]
    if not Path(runtimes[0]).is_absolute():
        pytest.skip("the compiler has no AddressSanitizer")
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    return {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": options, "FASTPPO_TEST_SANITIZE": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("op", TESTED_OPS)
def test_executed_kernels_stay_in_bounds(op):
    """The same under AddressSanitizer and UndefinedBehaviorSanitizer."""
    environment = sanitizer_environment()
    build.build(sanitize=True)
    # -s: what a sanitizer says must outlive the process.
    run_tests(*map(str, sorted((ROOT / "tests" / "ops").glob(f"test_{op}*.py"))), "-s", "-k", SANITIZED, **environment)


# ---- the emulator itself


def test_a_sound_kernel_passes(emulated_cuda):
    out = torch.zeros(THREADS)
    before = emulated_cuda.launches()
    emulated_cuda.fault("sound", out.data_ptr())
    assert (out == THREADS * (THREADS - 1) / 2).all() and emulated_cuda.launches() == before + 1


@pytest.mark.parametrize("fault", ["missing_barrier", "uninitialised_shared"])
def test_shared_memory_starts_as_nan(emulated_cuda, fault):
    out = torch.zeros(THREADS)
    emulated_cuda.fault(fault, out.data_ptr())
    assert out.isnan().any()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "divergent_barrier",
            r"32 from thread 0: waits for the block at .*faults.cu:\d+; 32 from thread 32: has exited",
        ),
        ("different_barriers", r"32 from thread 0: waits for the block .*; 32 from thread 32: waits for the block"),
        ("divergent_shuffle", r"5 from thread 0: waits for its warp at .*; 1 from thread 5: has exited"),
        ("absent_source", r"lane \d+ reads from lane 20, which takes no part, at .*faults.cu"),
    ],
)
def test_threads_that_do_not_meet_are_an_error(emulated_cuda, fault, message):
    out = torch.zeros(THREADS)
    with pytest.raises(RuntimeError, match=message):
        emulated_cuda.fault(fault, out.data_ptr())
    emulated_cuda.fault("sound", out.data_ptr())  # and the next kernel runs as if nothing had been


FAULT = """
import torch
from tests.cuda_on_cpu import build
from tests.kernel_resources import (
    BEGIN,
    CUDA_SOURCES,
    DOCS,
    END,
    MOST_SHARED,
    TRITON_LAUNCHES,
    compile_cuda,
    cuda_kernel_names,
    find_nvcc,
)
out = torch.zeros(64)
build.load(build.build(sanitize=True)).fault({fault!r}, out.data_ptr())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("sound", ""),
        ("beyond_the_tensor", "heap-buffer-overflow"),
        ("beyond_shared", "out of bounds|global-buffer-overflow"),
        ("beyond_dynamic_shared", "heap-buffer-overflow"),
        ("misaligned", "misaligned address"),
    ],
)
def test_sanitizers_see_into_kernels(fault, message):
    environment = os.environ | sanitizer_environment()
    command = [sys.executable, "-c", FAULT.format(fault=fault)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == (fault == "sound"), done.stderr[-3000:]
    assert re.search(message, done.stderr), done.stderr[-3000:]


def test_static_locals_of_kernels_are_shared_memory_alone():
    """The emulator fills every static local of fastppo::cuda before each block: host code there may have none."""
    for path in (ROOT / "csrc" / "cuda").glob("*"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            variable = re.match(r"\s*static (?!constexpr|__forceinline__)[\w:<>]+ \w+\s*[=;{\[]", line)
            assert not variable, f"{path.name}:{number}: {line.strip()}"


# ---- what the package says about the backend


def test_reasons(monkeypatch):
    op = TESTED_OPS[0]
    assert _backends.why_not(op, "cuda", "cpu") == "the tensors are on cpu"
    monkeypatch.setattr(native, "_C", object())
    for name, backend in ((op, "cuda"), *((beside, "triton") for beside in _backends.CUDA_BESIDE_TRITON)):
        assert "the CUDA kernels are not built: install nvcc" in _backends.why_not(name, backend, "cuda")
    with use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' was asked for, but the tensors are on cpu"):
        masked_whiten(torch.zeros(3))


def test_cuda_errors_are_python_errors(emulated_cuda):
    with pytest.raises(RuntimeError, match="CUDA: invalid argument"):
        emulated_cuda.cuda.masked_moments((0, 0), 0, 0, 0, [0, 0, 0], (7, 0))


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda x: gae(x, x, x > 0, gamma=1.0, lam=0.9), 1),
        (lambda x: gae(x[0], x[0], gamma=1.0, lam=0.9, cu_seqlens=torch.tensor([0, 7, x.shape[1]]).int()), 2),
        (lambda x: masked_mean(x, x > 0), 2),
        (lambda x: masked_whiten(x, x > 0), 3),
    ],
    ids=["gae", "packed gae and its offsets' check", "mean", "whiten"],
)
def test_number_of_launches(emulated_cuda, cuda_kernels_on_the_cpu, call, expected):
    """Whatever the length."""
    for length in (10, 9000):
        before = emulated_cuda.launches()
        with use_backend("cuda"):
            call(torch.randn(2, length))
        assert emulated_cuda.launches() - before == expected


# ---- nvcc


@pytest.mark.slow
@pytest.mark.parametrize("capability", MOST_SHARED)
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source, capability, tmp_path):
    if find_nvcc() is None:
        pytest.skip("needs nvcc to compile the kernels for GPUs")
    kernels = compile_cuda(source, capability, tmp_path)
    assert kernels
    for name, usage in kernels:
        print(f"{name} sm_{capability}: {usage.registers} registers, {usage.shared} bytes of shared memory")
        assert usage.local == 0, f"{name} uses local memory"
        assert usage.shared <= MOST_SHARED[capability]


def test_the_table_of_registers_names_every_kernel():
    """docs/performance.md was written since a kernel came or went."""
    table = DOCS.read_text().split(BEGIN)[1].split(END)[0]
    named = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert named == {launch[1] for launch in TRITON_LAUNCHES} | cuda_kernel_names()
