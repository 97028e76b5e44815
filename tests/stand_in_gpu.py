"""A GPU that no machine needs: tensors with shapes and no numbers, on PyTorch's device "meta", and a note of whatever the host would wait for.

Host tensors are real. A number that the host reads from the GPU is 0. Custom ops show their fake implementations only: what those of a GPU
wait for, `tests/test_gpu.py` sees on a real one.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastppo import native
from fastppo.ops import _backends

DEVICE = torch.device("meta")
PACKAGE = Path(_backends.__file__).resolve().parents[1]

# Whose result, or its shape, the host must know.
READS = {
    "_local_scalar_dense", "_unique2", "allclose", "equal", "is_nonzero", "masked_select", "nonzero", "unique_consecutive", "unique_dim",
}  # fmt: skip
INDEXING = (Tensor.__getitem__, Tensor.__setitem__)


class StandInGPU(TorchDispatchMode):
    """waits: "module.function: op" of each time that the host would have waited."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._pinned: list[Tensor] = []  # kept alive, so that none of them is taken for another

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        if name in ("_pin_memory", "pin_memory"):
            self._pinned.append(args[0].clone())
            return self._pinned[-1]
        tensors = [x for x in _pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(x.is_meta for x in tensors) or torch.device(kwargs.get("device") or "cpu") == DEVICE:
            if self._waits(name, args, kwargs):
                self.note(name)
            if name == "_local_scalar_dense":
                return 0.0 if args[0].is_floating_point() else 0
            if name == "_to_copy" and _goes_to_host(kwargs):
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return function(*args, **kwargs)

    def _waits(self, name: str, args, kwargs) -> bool:
        if name == "repeat_interleave":
            return kwargs.get("output_size") is None
        if name in ("index", "index_put", "index_put_"):
            return any(x is not None and (not x.is_meta or x.dtype in (torch.bool, torch.uint8)) for x in args[1])
        if name == "copy_":
            return args[0].device != args[1].device and not (self.is_pinned(args[1]) and args[2:3] == (True,))
        if name == "_to_copy":
            from_host = not args[0].is_meta and not (self.is_pinned(args[0]) and kwargs.get("non_blocking", False))
            return from_host or _goes_to_host(kwargs)
        return name in READS

    def is_pinned(self, x: Tensor) -> bool:
        return any(x is pinned for pinned in self._pinned)

    def note(self, name: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if PACKAGE in Path(frame.filename).parents]
        where = f"{Path(frames[-1].filename).stem}.{frames[-1].name}" if frames else "elsewhere"
        self.waits.append(f"{where}: {name}")


def _goes_to_host(kwargs) -> bool:
    """Of a copy of a tensor on the stand-in."""
    return torch.device(kwargs.get("device") or DEVICE) != DEVICE


class _HostNumbers(TorchFunctionMode):
    """`torch.tensor` and indices of host numbers, which dispatch no copy to this device."""

    def __init__(self, gpu: StandInGPU) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = None
        if function in (torch.tensor, torch.as_tensor):
            device = kwargs.get("device")
        elif function is Tensor.new_tensor or (function in INDEXING and _holds_list(args[1])):
            device = args[0].device
        if device is not None and torch.device(device) == DEVICE:
            self._gpu.note(function.__name__)
        return function(*args, **kwargs)


def _holds_list(index: object) -> bool:
    return any(isinstance(part, list) for part in (index if isinstance(index, tuple) else (index,)))


@contextmanager
def stand_in_gpu() -> Iterator[StandInGPU]:
    """Inside the block "meta" is a GPU, whose kernels serve every op."""
    why_not, gpu = _backends.why_not, StandInGPU()

    def serves(op: str, backend: str, device_type: str) -> str | None:
        return why_not(op, backend, "cuda" if device_type == DEVICE.type else device_type)

    with (
        patch.object(_backends, "why_not", serves),
        patch.object(native, "cuda_unavailable_reason", lambda: None),
        _HostNumbers(gpu),
        gpu,
    ):
        yield gpu
