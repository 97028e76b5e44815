"""Holding everything that computes on the CPU to a lesser instruction set: our kernels, and the libraries that plain PyTorch calls.

Each library reads its own variable when it is loaded, so the bench starts itself anew with all of them set.
"""

from __future__ import annotations

import getpass
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fastppo import native

# Of our kernels, of torch's own, of oneDNN's and of MKL's.
VARIABLES = {
    "avx2": {
        "FASTPPO_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
}


def held_to(isa: str, environ: Mapping[str, str]) -> bool:
    return all(environ.get(name) == value for name, value in VARIABLES[isa].items())


def start_again(isa: str, arguments: Sequence[str]) -> None:
    """Replaces this process by the same command, held to `isa`.

    torch.compile's cache does not tell programs of two instruction sets apart, and one that meets the other's corrupts the heap: the new
    process has a cache of its own.
    """
    command = [sys.executable, "-m", "fastppo.bench", *arguments]
    cache = {
        "TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"fastppo-torchinductor-{getpass.getuser()}-{isa}")
    }
    os.execve(sys.executable, command, os.environ | VARIABLES[isa] | cache)


def check(isa: str) -> None:
    """ValueError where our kernels or torch's are of another instruction set."""
    for name, found in (("fastppo's", native.cpu_isa()), ("torch's", of_torch())):
        if found != isa:
            raise ValueError(f"--isa {isa}: {name} kernels here are {found}")


def of_torch() -> str:
    """What torch's own kernels use, by our names: its AVX512 and AVX2; others as it calls them, in small letters."""
    return torch.backends.cpu.get_cpu_capability().lower()
