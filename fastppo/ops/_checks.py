"""Argument errors, in one wording: which argument, what it was, what it should be."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor

# What divides logits (temperature, softcap) lies between these two, and what multiplies them (logit_scale) is at most the second:
# logits of up to 1e18, their softmax and its slope then stay within fp32.
SMALLEST_DIVISOR, LARGEST_FACTOR = 1e-10, 1e10


FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def fits(value: object, dtypes: tuple[torch.dtype, ...], like: Tensor) -> bool:
    """Whether `value` is a tensor of one of these types with the shape and device of `like`: all checks below in one, without a name."""
    return (
        isinstance(value, Tensor)
        and value.dtype in dtypes
        and value.shape == like.shape
        and value.device == like.device
    )


def tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {type(value).__name__}, expected a torch.Tensor")


def floating(name: str, value: object) -> None:
    """fp64, fp32, bf16 or fp16."""
    tensor(name, value)
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} has dtype {value.dtype}, expected float64, float32, bfloat16 or float16")


def integer(name: str, value: object) -> None:
    """int64 or int32."""
    tensor(name, value)
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} has dtype {value.dtype}, expected int64 or int32")


def mask(name: str, value: object) -> None:
    tensor(name, value)
    if value.dtype != torch.bool:
        raise TypeError(f"{name} has dtype {value.dtype}, expected bool (write `{name}.bool()`)")


def same_dtype(name: str, value: object, other_name: str, other: Tensor) -> None:
    tensor(name, value)
    if value.dtype != other.dtype:
        raise TypeError(f"{name} has dtype {value.dtype}, expected {other.dtype} like {other_name}")


def shape(name: str, value: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """`meaning` says where the expected shape comes from, e.g. "logits' leading shape"."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name} has shape {list(value.shape)}, expected {list(expected)} ({meaning})")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device}, expected {other.device} like {other_name}")


def number(
    name: str, value: object, *, above: float = -math.inf, at_least: float = -math.inf, at_most: float = math.inf
) -> float:
    """A finite real number in the given interval, as a Python float."""
    if isinstance(value, bool) or not isinstance(value, Real | torch.SymFloat | torch.SymInt):
        raise TypeError(f"{name} is {value!r}, expected a real number")
    # Comparisons alone, which NaN fails too: torch.compile can trace them, unlike math.isfinite.
    if not (above < value < math.inf and at_least <= value <= at_most):
        bounds = [f"> {above}" for _ in [0] if above > -math.inf]
        bounds += [f">= {at_least}" for _ in [0] if at_least > -math.inf]
        bounds += [f"<= {at_most}" for _ in [0] if at_most < math.inf]
        raise ValueError(f"{name} is {value!r}, expected a finite number {' and '.join(bounds)}".rstrip())
    return value if isinstance(value, torch.SymFloat) else float(value)


def number_or_zero(name: str, value: object, *, smallest: float, at_most: float) -> float:
    """0, or a real number in the given interval."""
    found = number(name, value, at_least=0, at_most=at_most)
    if 0 < found < smallest:
        raise ValueError(f"{name} is {value!r}, expected 0 or a number from {smallest} to {at_most}")
    return found


def integer_number(name: str, value: object, *, at_least: int = 0, at_most: int = (1 << 63) - 1) -> int:
    """An integer in the given interval, as a Python int."""
    if isinstance(value, bool) or not isinstance(value, Integral | torch.SymInt):
        raise TypeError(f"{name} is {value!r}, expected an integer")
    if not at_least <= value <= at_most:
        raise ValueError(f"{name} is {value!r}, expected an integer from {at_least} to {at_most}")
    return value if isinstance(value, torch.SymInt) else int(value)


def choice(name: str, value: object, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, options))}")


def cu_seqlens(name: str, value: object, packed_name: str, packed: Tensor) -> None:
    """int32 or int64 offsets [B + 1] of the sequences in `packed` [total]; their values are for `offsets_in_order`."""
    integer(name, value)
    if value.dim() != 1 or value.shape[0] < 1:
        raise ValueError(f"{name} has shape {list(value.shape)}, expected [B + 1]")
    if packed.dim() != 1:
        raise ValueError(f"{packed_name} has shape {list(packed.shape)}, expected [total] (packed) beside {name}")
    same_device(name, value, packed_name, packed)


def offsets_in_order(name: str, value: Tensor, total: int) -> None:
    """What the kernels check themselves, for the reference: offsets start at 0, never fall and end at `total`.

    Not in a compiled graph, which cannot look at values.
    """
    if torch.compiler.is_compiling():
        return
    wrong = torch.cat([value[:1] != 0, (value.diff() < 0) | (value[1:] > total)])
    wrong[-1] |= value[-1] != total
    if wrong.any():
        bad = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name} holds {value[bad].item()} at position {bad}, "
            f"expected 0 first, no decrease and {total} (all tokens) last"
        )
