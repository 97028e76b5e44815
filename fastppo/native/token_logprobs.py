"""Allocates the outputs of token log-probs and calls the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.native import _C, address, rows, threads


def label_error(labels: Tensor, position: int, vocabulary: int, ignore_index: int) -> ValueError:
    """What is wrong with the label at flat `position`."""
    return ValueError(
        f"labels holds {labels.reshape(-1)[position].item()} at flat position {position}, "
        f"expected 0 <= label < {vocabulary} or ignore_index = {ignore_index}"
    )


def token_logprobs_forward(
    logits: Tensor, labels: Tensor, ignore_index: int, transform: tuple[float, float, float], with_entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """logits [outer, inner, V] with last stride 1, labels int64 [outer * inner] -> fp32 logprobs, entropy, (max, log-sum).

    transform: (scale, softcap or 0, temperature).
    """
    logprobs = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    entropy = torch.empty_like(logprobs) if with_entropy else None
    max_logsum = torch.empty((len(labels), 2), dtype=torch.float32, device=logits.device)
    bad = _C.token_logprobs_forward(
        rows(logits), address(labels), ignore_index, transform,
        address(logprobs), address(entropy), address(max_logsum), threads(),
    )  # fmt: skip
    if bad >= 0:
        raise label_error(labels, bad, logits.shape[-1], ignore_index)
    return logprobs, entropy, max_logsum


def token_logprobs_add_tile(
    tile: Tensor, labels: Tensor, transform: tuple[float, float, float], with_entropy: bool, state: Tensor
) -> None:
    """Adds fp32 columns [rows, width] to `state`, fp64 [rows, 4]: max z, sum exp(z - max) - 1, sum exp(z - max) (z - max), label's z.

    labels int64 [rows] count from the tile's first column. Everything contiguous; `state` starts as (-inf, -1, 0, NaN).
    """
    count, width = tile.shape
    _C.token_logprobs_add_tile(
        address(tile), address(labels), count, width, transform, with_entropy, address(state), threads()
    )


def token_logprobs_backward(
    logits: Tensor, labels: Tensor, ignore_index: int, transform: tuple[float, float, float], max_logsum: Tensor,
    entropy: Tensor | None, d_logprobs: Tensor, d_entropy: Tensor | None, grad: Tensor,
) -> None:  # fmt: skip
    """Writes the gradient of logits [outer, inner, V] into `grad`: contiguous rows, or the logits themselves.

    A label outside [0, V) that is not `ignore_index` stands in columns that these logits do not hold.
    """
    _C.token_logprobs_backward(
        rows(logits), address(labels), ignore_index, transform, address(max_logsum), address(entropy),
        address(d_logprobs), address(d_entropy), address(grad), threads(),
    )  # fmt: skip
