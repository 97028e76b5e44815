"""One token for each row of logits, with its log-probability before and after the filters."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.native import sample_tokens as native
from fastppo.ops import _checks
from fastppo.ops._backends import choose
from fastppo.ops._numbers import filled
from fastppo.ops._registry import custom_op
from fastppo.reference import sample_tokens as reference

TEMPERATURES = {"smallest": _checks.SMALLEST_DIVISOR, "at_most": _checks.LARGEST_FACTOR}
MAX_VOCABULARY = 1 << 22  # 2^22 masses of at most 2^40 add up in an int64


class SampledTokens(NamedTuple):
    tokens: Tensor
    logprobs: Tensor
    processed_logprobs: Tensor
    kept_mass: Tensor


def sample_tokens(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int = 0,
    sequence_ids: Tensor | None = None,
    positions: Tensor | None = None,
) -> SampledTokens:
    """Draws one token a row from softmax(logits / temperature) after top-k, top-p and min-p, in that order.

    A token depends on its row of logits, its row's parameters, `seed`, its sequence id and its position: not on the
    batch around it, the thread count, the instruction set or the backend. The filters are thresholds on the logits, so
    tokens with equal logits are kept or dropped together: top-k keeps logits >= the k-th largest; top-p keeps the
    smallest set {logit >= t} that holds at least `top_p` of top-k's mass (Holtzman et al. 2020, arXiv:1904.09751);
    min-p keeps p >= min_p * p_max (Nguyen et al. 2024, arXiv:2407.01082). Probabilities are multiples of 2^-40 of the
    largest one: a token less likely than 2^-41 of it is never drawn.

    Args:
        logits: [B, V] float32, bfloat16 or float16 (float64 is rounded to float32 for the choice), V <= 2^22; any
            strides. -inf bans a token.
        temperature: from 1e-10 to 1e10, a number or [B]; or 0, which takes the largest logit (the first of equals) and ignores
            the filters.
        top_k: >= 0, a number or integer [B]; 0 or >= V switches it off.
        top_p: in [0, 1], a number or [B]; 1 switches it off, 0 keeps the largest logit and its equals.
        min_p: in [0, 1], a number or [B]; 0 switches it off.
        seed: in [0, 2^63).
        sequence_ids: int64 or int32 [B], which random stream a row belongs to; default 0, 1, 2, ...
        positions: int64 or int32 [B], where in its stream a row stands; default 0. Advance it every step, or the draw
            repeats.

    Returns:
        `SampledTokens` of [B] tensors: int64 `tokens`; float32 `logprobs` in nats = log softmax(logits /
        temperature)[token], as `token_logprobs` gives them; `processed_logprobs`, the same within the kept tokens;
        `kept_mass`, the share of probability that the filters kept. Temperature 0 gives both log-probs unfiltered at
        temperature 1, and kept mass 1. A row without a distribution (NaN or +inf, or nothing but -inf, once divided by
        the temperature) gives token -1, NaN, NaN and 0. Nothing is differentiable.

    Raises:
        TypeError, ValueError: wrong type, shape or device, or (for tensors: on the CPU) a parameter out of range.
    """
    _check_logits(logits)
    logits = logits.detach()
    parameters = (
        _row_parameter("temperature", temperature, logits, torch.float32, **TEMPERATURES),
        _row_parameter("top_k", top_k, logits, torch.int64),
        _row_parameter("top_p", top_p, logits, torch.float32, at_most=1),
        _row_parameter("min_p", min_p, logits, torch.float32, at_most=1),
        _row_numbers("sequence_ids", sequence_ids, logits),
        _row_numbers("positions", positions, logits),
    )
    seed = _checks.integer_number("seed", seed)
    run = reference.sample_tokens if choose("sample_tokens", logits) == "reference" else _sample_tokens
    return SampledTokens(*run(logits, *parameters, seed))


def _check_logits(logits: Tensor) -> None:
    _checks.floating("logits", logits)
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= MAX_VOCABULARY:
        raise ValueError(f"logits has shape {list(logits.shape)}, expected [B, V] with 1 <= V <= {MAX_VOCABULARY}")


def _row_parameter(
    name: str, value: object, logits: Tensor, dtype: torch.dtype, *, smallest: float = 0, at_most: float | None = None
) -> Tensor:
    """`value`, a number or a tensor [B], as a checked tensor [B] of `dtype`; `smallest` is the smallest besides 0."""
    if not isinstance(value, Tensor):
        number = _row_number(name, value, dtype, smallest, at_most)
        return filled(logits.shape[:1], number, dtype, logits.device)
    (_checks.integer if dtype == torch.int64 else _checks.floating)(name, value)
    _check_row_tensor(name, value, logits)
    given = value = value.detach()
    if smallest:  # what is below it could be 0 in fp32, which is good: -1 is not
        value = torch.where((given > 0) & (given < smallest), -1, given)
    # On a GPU the look would wait for the device: there, as in a compiled graph, a bad value makes its row an error
    # row.
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = ~(value >= 0) | ~value.isfinite() | (value > (at_most or torch.inf))
        if bad.any():
            row = bad.nonzero()[0].item()
            _row_number(f"{name}[{row}]", given[row].item(), dtype, smallest, at_most)
    return value.to(dtype)


def _row_number(name: str, value: object, dtype: torch.dtype, smallest: float, at_most: float | None) -> float:
    if smallest:
        return _checks.number_or_zero(name, value, smallest=smallest, at_most=at_most)
    limit = {} if at_most is None else {"at_most": at_most}
    return (_checks.integer_number if dtype == torch.int64 else _checks.number)(name, value, at_least=0, **limit)


def _row_numbers(name: str, value: Tensor | None, logits: Tensor) -> Tensor:
    if value is None:
        make = torch.arange if name == "sequence_ids" else torch.zeros
        return make(logits.shape[0], dtype=torch.int64, device=logits.device)
    _checks.integer(name, value)
    _check_row_tensor(name, value, logits)
    return value.long()


def _check_row_tensor(name: str, value: Tensor, logits: Tensor) -> None:
    _checks.shape(name, value, logits.shape[:1], "one for each row of logits")
    _checks.same_device(name, value, "logits", logits)


@custom_op("sample_tokens")
def _sample_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    sequence_ids: Tensor,
    positions: Tensor,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return native.sample_tokens(logits, temperature, top_k, top_p, min_p, sequence_ids, positions, seed)


@torch.library.register_fake("fastppo::sample_tokens")
def _(logits, temperature, top_k, top_p, min_p, sequence_ids, positions, seed):
    floats = [torch.empty_like(temperature, memory_format=torch.contiguous_format) for _ in range(3)]
    return torch.empty_like(positions, memory_format=torch.contiguous_format), *floats
