"""Fixtures shared by all tests: fixed seeds, every backend the machine has, the shared real inputs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fastppo import native
from fastppo.ops import use_backend

# Tiny models gain nothing from threads, and threads of parallel test processes that wait for each other cost twenty times.
torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """No test may reach a model or data hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Runs the test once on each backend of the CPU; inside, every op uses it.

    Triton's interpreter must be switched on before its kernels are imported: `FASTPPO_TEST_BACKEND=triton` runs the same tests
    through it, in a process of its own (tests/test_triton.py starts one).
    """
    name = os.environ.get("FASTPPO_TEST_BACKEND", request.param)
    if name != request.param and request.param != "cpu":
        pytest.skip(f"only {name} is tested in this process")
    if name == "cpu" and native.unavailable_reason:
        pytest.skip(native.unavailable_reason)
    with use_backend(name):
        yield name


@pytest.fixture
def cpu_backend():
    if native.unavailable_reason:
        pytest.skip(native.unavailable_reason)
    with use_backend("cpu"):
        yield


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
