"""The C++ kernels give the same bits on every instruction set; each needs a process of its own, as it is chosen at load."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fastppo import native

ROOT = Path(__file__).resolve().parents[1]
ISAS = ("plain", "avx2", "avx512")


def assert_same_bits_on_every_isa(module: str, but: str | None = None) -> None:
    """`module` of tests/ops has a function `isa_outputs() -> list[Tensor]`, computed under this machine's instruction set and each lesser one.

    but: one that may differ.
    """
    here = _outputs(native.cpu_isa())[module]
    for isa in ISAS[: ISAS.index(native.cpu_isa())]:
        if isa == but:
            continue
        for i, (ours, other) in enumerate(zip(here, _outputs(isa)[module], strict=True)):
            assert torch.equal(ours.nan_to_num(), other.nan_to_num()), f"output {i} differs on {isa}"


@cache
def _outputs(isa: str) -> dict[str, list[Tensor]]:
    """Those of all modules, from one process: to import takes it longer than to compute."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outputs.pt"
        code = f"from tests.isa import save_outputs; save_outputs({str(path)!r})"
        env = os.environ | {"FASTPPO_ISA": isa, "FASTPPO_BACKEND": "cpu"}
        subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, check=True)
        return torch.load(path, weights_only=True)


def save_outputs(path: str) -> None:
    """{module: its `isa_outputs()`} of every module of tests/ops that has some, under the instruction set of this process."""
    files = sorted((ROOT / "tests" / "ops").glob("test_*.py"))
    modules = [f"tests.ops.{file.stem}" for file in files if "def isa_outputs" in file.read_text()]
    torch.save({module: _seeded_outputs(module) for module in modules}, path)


def _seeded_outputs(module: str) -> list[Tensor]:
    torch.manual_seed(0)
    return importlib.import_module(module).isa_outputs()
