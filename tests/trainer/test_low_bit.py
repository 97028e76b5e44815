"""Optimizers that need torchao, in a process that finds it: another one may be without it, and is told so."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastppo.config import OptimizerConfig
from fastppo.optimizer import Optimizer

TORCHAO = Path(sys.prefix) / "torchao"


@pytest.mark.slow
def test_with_torchao():
    """Apart from the other packages: it says on stderr, in every process that finds it, which of its libraries it could not load."""
    if not TORCHAO.is_dir():
        pytest.skip(f"no torchao in {TORCHAO}")
    tests = Path(__file__).with_name("low_bit.py")
    environment = {**os.environ, "PYTHONPATH": str(TORCHAO), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", str(tests)]
    done = subprocess.run(command, cwd=tests.parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize("settings", [{"name": "adamw_8bit"}, {"bf16_stochastic_round": True}], ids=str)
def test_without_torchao_the_package_is_named(settings):
    if importlib.util.find_spec("torchao"):
        pytest.skip("torchao is installed")
    with pytest.raises(ImportError, match=r"need torchao .*: pip install 'fastppo\[low-bit\]'"):
        Optimizer([("w", nn.Parameter(torch.ones(2)))], 1e-3, OptimizerConfig(**settings))
