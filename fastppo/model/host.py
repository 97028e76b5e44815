"""From the host to the device, without the host waiting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(values: Sequence | Tensor, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """`values`, which the host holds, as a tensor there; the host does not wait for the copy, as it would from pageable memory."""
    on_host = torch.as_tensor(values, dtype=dtype, device="cpu")
    if device.type != "cpu":
        on_host = on_host.pin_memory()
    return on_host.to(device, non_blocking=True)
