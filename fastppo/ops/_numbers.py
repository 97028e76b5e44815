"""Dynamic numbers: Python floats that torch.compile does not pin to a value, so that a graph is compiled once for all their values.

Such a float is a 0-d fp64 input of the graph, and stays one where it is multiplied with a tensor. Handed on as a float, to an op of torch's or
of ours, it is pinned, and each new value compiles anew.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value


def is_dynamic(number: float | Sequence[float]) -> bool:
    """Whether a number, or one of several, is dynamic in the graph that is being compiled."""
    if isinstance(number, list | tuple):
        return any(map(is_dynamic, number))
    return torch.compiler.is_compiling() and not has_static_value(number)


def filled(shape: Sequence[int], number: float, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """torch.full, for dynamic numbers too."""
    if is_dynamic(number):
        return (number * torch.ones(shape, dtype=torch.float64, device=device)).to(dtype)
    return torch.full(shape, number, dtype=dtype, device=device)


def as_tensor(number: float | Sequence[float]) -> Tensor:
    """fp64 [] for a number, [N] for several; on the CPU, where the host reads them."""
    if isinstance(number, list | tuple):
        return torch.stack([as_tensor(one) for one in number])
    return filled((), number, torch.float64, "cpu")
