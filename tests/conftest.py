"""Fixtures shared by all tests: fixed seeds, every backend the machine has, the shared real inputs."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastppo import native
from fastppo.ops import use_backend
from tests.cuda_on_cpu import build as cuda_on_cpu

# Tiny models gain nothing from threads, and threads of parallel test processes that wait for each other cost twenty times.
torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_finish() -> None:
    """What was made until now, a million objects, stays: no later collection looks through it, which took half a second, more in a forked process."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Libraries call leaked what the last collection leaves."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """No test may reach a model or data hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def _no_curve():
    """Drawing takes longer than most runs here: they draw where a test asks for `curves`."""
    with pytest.MonkeyPatch.context() as patch:
        if run_loop := sys.modules.get("fastppo.run_loop"):  # the kernels' processes have no trainer
            patch.setattr(run_loop, "plot_run", lambda folder: None)
        yield


@pytest.fixture
def curves(monkeypatch):
    """Each run of this process draws its curve.png."""
    from fastppo.plot import plot_run

    monkeypatch.setattr("fastppo.run_loop.plot_run", plot_run)


@pytest.fixture
def plain_signal_handlers():
    """Those of a Python process in a terminal, whoever runs the tests."""
    from fastppo.interruption import ENDING  # the kernels' processes need no trainer

    before = {number: signal.signal(number, usual) for number, usual in ENDING.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# Two more backends run the tests of ops in a process of their own, in place of `cpu`: `triton` through Triton's interpreter, which must be
# switched on before its kernels are imported (tests/test_triton.py starts one), and `cuda` with the CUDA kernels executed on the CPU
# (tests/test_cuda_on_cpu.py). On a GPU (tests/test_gpu.py) every tensor of the tests is made there, and the kernels are the compiled ones.
FAST_BACKEND = os.environ.get("FASTPPO_TEST_BACKEND", "cpu")
DEVICE = os.environ.get("FASTPPO_TEST_DEVICE")
if DEVICE:
    torch.set_default_device(DEVICE)
if os.environ.get("TRITON_INTERPRET") == "1":
    from tests import triton_interpreter

    triton_interpreter.multiply_as_a_gpu()
    triton_interpreter.call_functions_without_delay()


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Runs the test once on each backend of the CPU; inside, every op uses it."""
    if request.param == "reference" and FAST_BACKEND != "cpu":
        pytest.skip(f"only {FAST_BACKEND} is tested in this process")
    yield from _with_backend(FAST_BACKEND if request.param == "cpu" else "reference", request)


@pytest.fixture
def fast_backend(request):
    """The kernels that this process tests."""
    yield from _with_backend(FAST_BACKEND, request)


@pytest.fixture
def cpu_backend(request):
    """The kernels of csrc/cpu."""
    if FAST_BACKEND != "cpu":
        pytest.skip(f"only {FAST_BACKEND} is tested in this process")
    yield from _with_backend("cpu", request)


def _with_backend(name: str, request: pytest.FixtureRequest) -> Iterator[str]:
    if name in ("cpu", "cuda") and native.unavailable_reason:
        pytest.skip(native.unavailable_reason)
    if name == "cuda" and DEVICE != "cuda":
        request.getfixturevalue("cuda_kernels_on_the_cpu")
    with use_backend(name):
        yield name


@pytest.fixture
def cuda_kernels_on_the_cpu(emulated_cuda, monkeypatch):
    """In place of the compiled ones, and of the CPU's where nothing else is asked for."""
    monkeypatch.setattr(native._C, "cuda", emulated_cuda.cuda, raising=False)
    monkeypatch.setattr(native, "cuda_device_types", {"cpu", "cuda"})


@pytest.fixture(scope="session")
def emulated_cuda() -> ModuleType:
    """csrc/cuda as tests/cuda_on_cpu executes it."""
    return cuda_on_cpu.load(cuda_on_cpu.build(sanitize="FASTPPO_TEST_SANITIZE" in os.environ))


def _shared(path: str) -> Path:
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"needs {path} in a folder `shared` beside the checkout")
    return found


@pytest.fixture
def stories_model() -> Path:
    """A real pretrained Llama of 260 K parameters in Transformers' format."""
    return _shared("models/stories260K")


@pytest.fixture
def gsm8k_train() -> Path:
    """GSM8K's training split as JSON Lines, gzipped."""
    return _shared("data/gsm8k_train.jsonl.gz")


@pytest.fixture
def gsm8k_test() -> Path:
    """GSM8K's test split, in the same format."""
    return _shared("data/gsm8k_test.jsonl.gz")


@pytest.fixture
def make_trainer(tmp_path):
    """make_trainer(reward=count_a, *, model=..., prompts=..., eval_prompts=..., output_dir=..., **config changes) -> PPOTrainer"""
    from tests.tiny_trainer import build_trainer, count_a  # the kernels' processes need no trainer

    def make(reward=count_a, *, output_dir=tmp_path / "run", **arguments):
        return build_trainer(output_dir, reward=reward, **arguments)

    return make
