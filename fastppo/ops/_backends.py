"""Which implementation serves an op: what exists, what works here, what was asked for.

`FASTPPO_BACKEND=reference|cpu|cuda|triton` (read at import) forces one for every op; `use_backend` does so for a block
of code in its own thread. An op chooses once, in its public function: its backward pass, which may run in another thread
or block, runs where its forward pass did.
"""

from __future__ import annotations

import importlib.util
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo import native

BACKENDS = ("reference", "cpu", "cuda", "triton")

# The fast backends of each op, besides the reference that every op has: at most one a device type.
FAST_BACKENDS: dict[str, tuple[str, ...]] = {
    "token_logprobs": ("cpu", "triton"),
    "linear_token_logprobs": ("cpu", "triton"),
    "linear_ppo_loss": ("cpu", "triton"),
    "gae": ("cpu", "cuda"),
    "masked_whiten": ("cpu", "cuda"),
    "approx_kl": ("cpu", "cuda"),
    "ppo_loss": ("cpu", "cuda"),
    "sample_tokens": ("cpu", "cuda"),
    "decode_attention": ("cpu", "triton"),
    "packed_attention": ("cpu", "triton"),
    "batch_invariant_linear": ("cpu", "triton"),
    "rms_norm": ("cpu", "triton"),
    "rotary_embedding": ("cpu", "triton"),
    "swiglu": ("cpu", "triton"),
}

# Ops whose Triton path calls CUDA kernels too, on a GPU.
CUDA_BESIDE_TRITON = ("linear_ppo_loss",)

FAST_DTYPES = tuple(native.DTYPE_CODES)


def _check_name(name: str | None, source: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


_FORCED_BY_ENVIRONMENT = _check_name(os.environ.get("FASTPPO_BACKEND") or None, "FASTPPO_BACKEND")


class _Forced(threading.local):
    """A context variable would serve coroutines too, but torch.compile cannot read one."""

    def __init__(self) -> None:
        self.name = _FORCED_BY_ENVIRONMENT


_forced = _Forced()
_noticed: set[tuple[str, str]] = set()


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force backend `name` for every op that this thread calls inside the block; `None` restores the automatic choice.

    What is called inside keeps its backend: also a backward pass that runs after the block. Other threads choose for
    themselves.
    """
    previous, _forced.name = _forced.name, _check_name(name, "name")
    try:
        yield
    finally:
        _forced.name = previous


def forced_backend() -> str | None:
    """What `FASTPPO_BACKEND` or a block of `use_backend` asks for in this thread."""
    return _forced.name


def why_not(op: str, backend: str, device_type: str) -> str | None:
    """Reason why `backend` cannot serve `op` on tensors of `device_type`; None when it can."""
    if backend == "reference":
        return None
    if backend not in FAST_BACKENDS[op]:
        return f"{op} has no {backend} kernel"
    if backend == "cpu":
        return native.unavailable_reason if device_type == "cpu" else f"the tensors are on {device_type}"
    if backend == "cuda" and device_type in native.cuda_device_types:
        return native.cuda_unavailable_reason()
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if backend == "triton" and device_type == "cuda" and op in CUDA_BESIDE_TRITON:
        return native.cuda_unavailable_reason()
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return None if device_type == "cuda" or interpreted else f"the tensors are on {device_type}"


def choose(op: str, *tensors: Tensor) -> str:
    """The backend for `op` on these tensors; fp64 and unknown dtypes go to the reference, a missing kernel is said once."""
    if any(tensor.dtype not in FAST_DTYPES and tensor.is_floating_point() for tensor in tensors):
        return "reference"
    device_type = tensors[0].device.type
    forced = _forced.name
    if forced is not None:
        reason = why_not(op, forced, device_type)
        if reason is not None:
            raise RuntimeError(f"backend {forced!r} was asked for, but {reason}")
        return forced
    for backend in FAST_BACKENDS[op]:
        if why_not(op, backend, device_type) is None:
            return backend
    if not torch.compiler.is_compiling():
        _notice(op, device_type)
    return "reference"


def _notice(op: str, device_type: str) -> None:
    if (op, device_type) not in _noticed:
        _noticed.add((op, device_type))
        reasons = "; ".join(filter(None, (why_not(op, backend, device_type) for backend in FAST_BACKENDS[op])))
        warnings.warn(f"fastppo.{op} runs in plain PyTorch on {device_type}: {reasons}", stacklevel=4)


class OpStatus(NamedTuple):
    op: str
    backend: str
    reasons: dict[str, str]


def describe(device_type: str) -> list[OpStatus]:
    """For each op: the backend that serves it on tensors of `device_type`, and why each of its others does not.

    Asked of "cuda" where there is no GPU, it tells what would serve.
    """
    statuses = []
    for op, backends in FAST_BACKENDS.items():
        reasons = {backend: why_not(op, backend, device_type) for backend in backends}
        usable = [backend for backend, reason in reasons.items() if reason is None]
        others = {backend: reason for backend, reason in reasons.items() if reason is not None}
        statuses.append(OpStatus(op, _forced.name or (usable[0] if usable else "reference"), others))
    return statuses
