"""From the host to the device, without the host waiting, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def on_device(values: Sequence | Tensor, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """`values`, which the host holds, as a tensor there; the host does not wait for the copy, as it would from pageable memory."""
    on_host = torch.as_tensor(values, dtype=dtype, device="cpu")
    if device.type != "cpu":
        on_host = on_host.pin_memory()
    return on_host.to(device, non_blocking=True)


def on_host(x: Tensor) -> Tensor:
    """A copy there, from where a GPU fetches it without the host waiting."""
    copied = x.detach().to("cpu", copy=True)
    return copied.pin_memory() if torch.cuda.is_available() else copied


def require_gpu(setting: str, device: torch.device) -> None:
    """Raises ValueError for a setting that moves something to the host, which a CPU's memory is."""
    if device.type == "cpu":
        raise ValueError(f"{setting} is true, expected false on a CPU: its memory is the host's")


class Resting:
    """Parameters that never change and are kept on the host, but for the blocks in which they are needed where they were."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = list(module.parameters())
        self._devices = [parameter.device for parameter in self._parameters]
        self._kept = [on_host(parameter) for parameter in self._parameters]
        self._leave()

    @contextmanager
    def awake(self) -> Iterator[None]:
        for parameter, kept, device in zip(self._parameters, self._kept, self._devices, strict=True):
            parameter.data = kept.to(device, non_blocking=True)
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        for parameter, kept in zip(self._parameters, self._kept, strict=True):
            parameter.data = kept
