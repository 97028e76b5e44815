"""Full fp32 products, whatever torch is set to: `torch.set_float32_matmul_precision("medium")`, TF32 and oneDNN's bf16 are for the whole process."""

from __future__ import annotations

import threading
from typing import Any

import torch

EXACT = ("ieee", "none")


class FullPrecision:
    """Inside, in any thread, fp32 products of one backend round nothing but their results.

    torch knows no such setting for one thread or one call. So the process's own is set where it is less, and given back by the last thread
    that leaves; meanwhile the products of others are at worst more exact than they asked for.
    """

    def __init__(self, matmul: Any) -> None:
        self._matmul, self._lock = matmul, threading.Lock()
        self._inside = 0
        self._theirs: str | None = None  # what is to be given back

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            asked = self._matmul.fp32_precision
            if asked not in EXACT:
                self._theirs, self._matmul.fp32_precision = asked, "ieee"

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._theirs is not None:
                self._give_back(self._theirs)
                self._theirs = None

    def _give_back(self, theirs: str) -> None:
        if self._matmul.fp32_precision not in EXACT:
            return  # set anew meanwhile
        self._matmul.fp32_precision = "none"  # where that inherits it, as it did before
        if self._matmul.fp32_precision != theirs:
            self._matmul.fp32_precision = theirs


_ON_CPU, _ON_CUDA = FullPrecision(torch.backends.mkldnn.matmul), FullPrecision(torch.backends.cuda.matmul)


def full_precision(device: torch.device) -> FullPrecision:
    return _ON_CUDA if device.type == "cuda" else _ON_CPU
