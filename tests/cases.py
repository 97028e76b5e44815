"""Inputs that every op must survive: shapes, storage types, strides and dirty memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Rows and vocabulary: one element, tails of the 16-lane vector and of the 1024-element block, several blocks.
ROWS_BY_VOCAB = [(1, 1), (3, 17), (5, 252), (2, 1023), (4, 1024), (7, 1025), (3, 5000), (0, 33)]


def seeded(seed: int) -> torch.Generator:
    """A generator on the device where the tests make their tensors."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def strided_views(x: Tensor) -> dict[str, Tensor]:
    """Tensors equal to `x` [B, T, V] in other memory layouts; what lies between the elements is NaN."""
    batch, length, width = x.shape
    padded = torch.full((batch, length + 2, width + 5), torch.nan, dtype=x.dtype)
    padded[:, 1:-1, 3:-2] = x
    return {
        "contiguous": x.contiguous(),
        "sliced": padded[:, 1:-1, 3:-2],
        "time-major": x.transpose(0, 1).contiguous().transpose(0, 1),
        "vocabulary-major": x.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded": x[:1].expand(batch, length, width),
    }


CERTAIN_WIDTHS = (2, 37, 1000, 5000)  # a tail, one block of a kernel, several blocks of each


def certain_rows(width: int) -> tuple[Tensor, Tensor]:
    """Logits [N, width] whose largest is ahead by 5 to 60, even of all others together, and labels: it, one of two such, or another.

    It stands first, in the middle and last, so that the maximum which a kernel has met so far rises in every place. All differences are
    exact in fp32: the smallest probability can be as exact as exp.
    """
    rows, labels = [], []
    for margin, place in product((5, 10, 15, 30, 60), (0, width // 2, width - 1)):
        other = (place + width // 2) % width
        for largest, label in (([place], place), ([place, other], place), ([place], other)):
            row = 7.5 - max(margin, 5 + math.ceil(math.log(width))) - torch.randint(0, 17, (width,)) / 8
            row[largest] = 7.5
            rows.append(row)
            labels.append(label)
    return torch.stack(rows), torch.tensor(labels)


def with_threads(count: int, function: Callable[[], Result]) -> Result:
    """`function()` while torch, and so our kernels, use `count` threads."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        return function()
    finally:
        torch.set_num_threads(threads)
