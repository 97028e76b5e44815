"""Masks as the other trainers pass them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.ops import _checks


def binary(name: str, mask: Tensor, like: Tensor) -> Tensor:
    """`mask`, bool or 0 and 1 of any type, in the shape of `like`, as bool.

    Other numbers raise on the CPU. On a GPU, which the host does not wait for, all but 0 count as 1.
    """
    _checks.tensor(name, mask)
    _checks.shape(name, mask, like.shape, "one for each token")
    _checks.same_device(name, mask, "the tokens", like)
    if mask.dtype == torch.bool:
        return mask
    kept = mask != 0
    if not mask.is_cuda and not (kept == mask).all():
        raise ValueError(f"{name} holds other numbers than 0 and 1")
    return kept
