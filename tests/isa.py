"""The C++ kernels give the same bits on every instruction set; each needs a process of its own, as it is chosen at load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from fastppo import native

ROOT = Path(__file__).resolve().parents[1]
ISAS = ("plain", "avx2", "avx512")


def assert_same_bits_on_every_isa(module: str, tmp_path: Path, but: str | None = None) -> None:
    """`module` has a function `isa_outputs() -> list[Tensor]`, computed here and under each lesser instruction set.

    but: one that may differ.
    """
    here = _outputs(module, native.cpu_isa(), tmp_path)
    for isa in ISAS[: ISAS.index(native.cpu_isa())]:
        if isa == but:
            continue
        for i, (ours, other) in enumerate(zip(here, _outputs(module, isa, tmp_path), strict=True)):
            assert torch.equal(ours.nan_to_num(), other.nan_to_num()), f"output {i} differs on {isa}"


def _outputs(module: str, isa: str, tmp_path: Path) -> list[torch.Tensor]:
    path = tmp_path / f"{isa}.pt"
    code = f"import torch; from {module} import isa_outputs; torch.save(isa_outputs(), {str(path)!r})"
    env = os.environ | {"FASTPPO_ISA": isa, "FASTPPO_BACKEND": "cpu"}
    subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, check=True)
    return torch.load(path, weights_only=True)
