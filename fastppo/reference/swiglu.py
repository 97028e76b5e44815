"""The gate of a SwiGLU layer in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, silu(x) = x / (1 + exp(-x)) (arXiv:2002.05202, eq. 5), for gate and up [...]; in their type, computed in fp32 or wider."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)
