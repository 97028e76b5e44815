"""Allocates the outputs of the PPO loss and calls the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.native import (
    _C,
    DTYPE_CODES,
    address,
    as_offsets,
    check_same,
    codes,
    column,
    on_cuda,
    sequences,
    stream,
    threads,
)
from fastppo.native.approx_kl import KL_KINDS

PPO_COLUMNS = (
    "logprobs", "old_logprobs", "advantages", "values", "old_values", "returns",
    "ref_logprobs", "entropy", "rollout_logprobs", "weights", "sequence_log_ratios",
)  # fmt: skip
PPO_SUMS = (
    "policy_loss", "value_loss", "kl_loss", "entropy", "approx_kl", "ppo_kl", "clipfrac", "clipfrac_dual",
    "value_clipfrac", "ratio_mean", "ratio_max", "kl_ref", "rollout_weight_mean", "rollout_clipfrac", "tokens",
    "entropy_bonus",
)  # fmt: skip
PPO_STATISTICS = PPO_SUMS[:-1]
ROLLOUT_CORRECTIONS = (None, "truncate", "mask")
DTYPES = tuple(DTYPE_CODES)
check_same("PPO_COLUMNS", codes(PPO_COLUMNS))
check_same("PPO_SUMS", codes(PPO_SUMS))
check_same("ROLLOUT_CORRECTIONS", codes(ROLLOUT_CORRECTIONS))


class PPONumbers(NamedTuple):
    """The numbers of csrc/ops.h's PPOOptions."""

    ratio_min: float
    ratio_max: float
    dual_clip: float  # 0: off
    value_clip: float  # 0: off
    vf_coef: float
    kl_coef: float
    entropy_coef: float
    rollout_min: float
    rollout_max: float


check_same("PPO_NUMBERS", codes(PPONumbers._fields))


class PPOCodes(NamedTuple):
    """All of csrc/ops.h's PPOOptions, in two lists, as ops and kernels take them."""

    numbers: Sequence[float]  # PPONumbers
    choices: Sequence[int]  # places in KL_KINDS and ROLLOUT_CORRECTIONS, and whether the objective is CISPO's


class PPOOptions(NamedTuple):
    """What `fastppo.ops.ppo_loss` documents."""

    clip_low: float
    clip_high: float
    dual_clip: float | None
    value_clip: float | None
    vf_coef: float
    kl_coef: float
    kl_kind: str
    entropy_coef: float
    objective: str
    rollout_correction: str | None
    rollout_bounds: tuple[float, float]

    def codes(self) -> PPOCodes:
        numbers = PPONumbers(
            1 - self.clip_low, 1 + self.clip_high, self.dual_clip or 0.0, self.value_clip or 0.0,
            self.vf_coef, self.kl_coef, self.entropy_coef, *self.rollout_bounds,
        )  # fmt: skip
        correction = ROLLOUT_CORRECTIONS.index(self.rollout_correction)
        choices = [KL_KINDS.index(self.kl_kind), correction, int(self.objective == "cispo")]
        return PPOCodes(list(numbers), choices)


class SequenceColumns(NamedTuple):
    """What the sequences of a batch decide."""

    used: Tensor  # fp64 0-d: how many have an unmasked token; NaN where offsets are wrong
    weights: Tensor | None  # fp32 [N]: 1 / unmasked tokens of the token's sequence
    log_ratios: Tensor | None  # fp32 [N]: mean log-ratio of the token's sequence

    def columns(self) -> dict[str, Tensor]:
        made = {"weights": self.weights, "sequence_log_ratios": self.log_ratios}
        return {name: x for name, x in made.items() if x is not None}


class PPOResult(NamedTuple):
    loss: Tensor  # fp32 0-d
    statistics: Tensor  # fp32 [15], in the order of PPO_STATISTICS
    scale: Tensor  # fp64 0-d, 1 / denominator: what the gradients still have to be multiplied by


def ppo_tokens(columns: dict[str, Tensor], mask: Tensor | None) -> tuple[list[tuple[int, int]], int, int]:
    """Contiguous columns of one shape, bool mask of that shape -> the bindings' description of them."""
    described = [column(columns[name]) if name in columns else (0, 0) for name in PPO_COLUMNS]
    return described, address(mask), columns["logprobs"].numel()


def ppo_loss_sequences(
    columns: dict[str, Tensor], mask: Tensor | None, cu_seqlens: Tensor | None,
    *, with_weights: bool = False, with_log_ratios: bool = False,
) -> SequenceColumns:  # fmt: skip
    """Sequences are rows of [B, T] columns, or ranges of packed ones."""
    logprobs = columns["logprobs"]
    offsets = as_offsets(cu_seqlens, logprobs.shape[0])
    total, shape = logprobs.numel(), sequences(logprobs, offsets)
    used = logprobs.new_empty((), dtype=torch.float64)
    weights = logprobs.new_empty(total, dtype=torch.float32) if with_weights else None
    log_ratios = logprobs.new_empty(total, dtype=torch.float32) if with_log_ratios else None
    outputs = address(weights), address(log_ratios), address(used)
    if on_cuda(logprobs):
        partial = logprobs.new_empty((_C.cuda.ppo_sequence_parts(total, shape[1]), 2), dtype=torch.float64)
        _C.cuda.ppo_loss_sequences(ppo_tokens(columns, mask), shape, address(partial), *outputs, stream(logprobs))
    else:
        _C.ppo_loss_sequences(ppo_tokens(columns, mask), shape, *outputs, threads())
    return SequenceColumns(used, weights, log_ratios)


def ppo_loss_tokens(
    columns: dict[str, Tensor], mask: Tensor | None, options: PPOCodes, wanted: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """(fp32 [parts, 16] sums over the unmasked tokens of each part, fp32 gradients of the `wanted` columns).

    Gradients are those of the sum of the token losses: `PPOResult.scale` is still missing. The sums of several calls,
    one below the other, are those of all their tokens.
    """
    logprobs = columns["logprobs"]
    kernels, where = (_C.cuda, stream(logprobs)) if on_cuda(logprobs) else (_C, threads())
    gradients = {name: torch.empty_like(columns[name], dtype=torch.float32) for name in wanted}
    parts = kernels.ppo_loss_parts(logprobs.numel())
    sums = torch.empty(parts, len(PPO_SUMS), dtype=torch.float32, device=logprobs.device)
    addresses = [address(gradients.get(name)) for name in ("logprobs", "values", "entropy")]
    kernels.ppo_loss_tokens(ppo_tokens(columns, mask), options, address(sums), addresses, where)
    return sums, gradients


def ppo_loss_finish(sums: Tensor, options: PPOCodes, denominator: Tensor | None) -> PPOResult:
    """The result from the sums that `ppo_loss_tokens` made; the denominator is a number > 0, or None for their tokens.

    ValueError on the CPU for a denominator out of range; on a GPU, which the host must not wait for, it gives NaN.
    """
    if denominator is not None:
        denominator = denominator.to(sums.device, torch.float64)
    loss, scale = (torch.empty((), dtype=dtype, device=sums.device) for dtype in (torch.float32, torch.float64))
    result = PPOResult(loss, sums.new_empty(len(PPO_STATISTICS)), scale)
    arguments = address(sums), len(sums), options, address(denominator), list(map(address, result))
    if on_cuda(sums):
        _C.cuda.ppo_loss_finish(*arguments, stream(sums))
        return result
    _C.ppo_loss_finish(*arguments)
    if denominator is not None and scale.isnan():
        raise ValueError(f"denominator is {denominator.item()}, expected a finite number > 0")
    return result


def scale_gradients(gradients: Sequence[Tensor], d_loss: Tensor, scale: Tensor, dtypes: Sequence[int]) -> list[Tensor]:
    """Each of the contiguous gradients, three on a GPU, times d_loss * scale, rounded once to its type, a place in DTYPES."""
    if not on_cuda(scale):
        factor = d_loss * scale
        return [(x * factor).to(DTYPES[code]) for x, code in zip(gradients, dtypes, strict=True)]
    scaled = [torch.empty_like(x, dtype=DTYPES[code]) for x, code in zip(gradients, dtypes, strict=True)]
    described = [(column(x), address(y), code, x.numel()) for x, y, code in zip(gradients, scaled, dtypes, strict=True)]
    _C.cuda.scale_gradients(described, address(d_loss), address(scale), stream(scale))
    return scaled
