"""Allocates the outputs of `rms_norm` and calls the kernels. Everything is contiguous fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.native import _C, address, on_huge_pages, threads


def rms_norm(x: Tensor, weight: Tensor, eps: float, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [N, H] and update [N, H] or None -> (x + update, its norm); without an update the first is x itself."""
    normed = on_huge_pages(torch.empty_like(x))
    total = x if update is None else on_huge_pages(torch.empty_like(x))
    rows, width = x.shape
    _C.rms_norm(
        x.data_ptr(), weight.data_ptr(), eps, rows, width, address(update), total.data_ptr(), normed.data_ptr(), threads()
    )  # fmt: skip
    return total, normed


def rms_norm_backward(
    x: Tensor, weight: Tensor, eps: float, d_normed: Tensor, d_total: Tensor | None, weight_wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x + update, which was normalised and went on besides with the gradient d_total, and of the weight."""
    d_x, d_weight = on_huge_pages(torch.empty_like(x)), torch.zeros_like(weight) if weight_wanted else None
    rows, width = x.shape
    _C.rms_norm_backward(
        x.data_ptr(), weight.data_ptr(), eps, rows, width, d_normed.data_ptr(), address(d_total), d_x.data_ptr(),
        address(d_weight), threads(),
    )  # fmt: skip
    return d_x, d_weight
