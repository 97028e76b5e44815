"""Specification of `batch_invariant_linear` in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def batch_invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K], weight [N, K], bias [N] -> x weight^T + bias [..., N], accumulated in fp32 or wider, rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(wide)
    with torch.autocast(x.device.type, enabled=False):  # the product would be rounded to half precision
        return torch.nn.functional.linear(x.to(wide), weight.to(wide), bias).to(x.dtype)
