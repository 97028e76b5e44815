"""Allocates the outputs of the PPO loss and calls the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.native import _C, DTYPE_CODES, address, threads
from fastppo.native.approx_kl import KL_KINDS

PPO_COLUMNS = (
    "logprobs", "old_logprobs", "advantages", "values", "old_values", "returns",
    "ref_logprobs", "entropy", "rollout_logprobs", "weights", "sequence_log_ratios",
)  # fmt: skip
PPO_SUMS = (
    "policy_loss", "value_loss", "kl_loss", "entropy_bonus", "entropy", "approx_kl", "ppo_kl", "clipfrac",
    "clipfrac_dual", "value_clipfrac", "ratio_mean", "kl_ref", "rollout_weight_mean", "rollout_clipfrac", "ratio_max",
)  # fmt: skip
ROLLOUT_CORRECTIONS = (None, "truncate", "mask")  # in the order of csrc/ops.h's RolloutCorrection


class PPOOptions(NamedTuple):
    """What `fastppo.ops.ppo_loss` documents, as the kernels take it."""

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

    def numbers(self, scale: float) -> list[float]:
        return [
            scale, 1 - self.clip_low, 1 + self.clip_high, self.dual_clip or 0.0, self.value_clip or 0.0,
            self.vf_coef, self.kl_coef, self.entropy_coef, *self.rollout_bounds,
        ]  # fmt: skip

    def choices(self) -> list[int]:
        correction = ROLLOUT_CORRECTIONS.index(self.rollout_correction)
        return [KL_KINDS.index(self.kl_kind), correction, self.objective == "cispo"]


class PPOCounts(NamedTuple):
    tokens: int  # unmasked tokens
    sequences: int  # sequences that have any
    weights: Tensor | None  # fp32 [N]: 1 / unmasked tokens of the token's sequence
    log_ratios: Tensor | None  # fp32 [N]: mean log-ratio of the token's sequence

    def columns(self) -> dict[str, Tensor]:
        made = {"weights": self.weights, "sequence_log_ratios": self.log_ratios}
        return {name: x for name, x in made.items() if x is not None}


def ppo_tokens(columns: dict[str, Tensor], mask: Tensor | None) -> tuple[list[tuple[int, int]], int, int]:
    """Contiguous columns of one shape, bool mask of that shape -> the bindings' description of them."""
    described = [
        (address(columns.get(name)), DTYPE_CODES[columns[name].dtype] if name in columns else 0) for name in PPO_COLUMNS
    ]
    return described, address(mask), columns["logprobs"].numel()


def ppo_loss_sequences(
    columns: dict[str, Tensor], mask: Tensor | None, cu_seqlens: Tensor | None,
    *, with_weights: bool = False, with_log_ratios: bool = False,
) -> PPOCounts:  # fmt: skip
    """Sequences are rows of [B, T] columns, or ranges of packed ones; tokens of any other shape make one sequence."""
    shape = columns["logprobs"].shape
    total = shape.numel()
    weights = torch.empty(total, dtype=torch.float32) if with_weights else None
    log_ratios = torch.empty(total, dtype=torch.float32) if with_log_ratios else None
    offsets = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    count, length = (1, total) if len(shape) != 2 else shape
    if offsets is not None:
        count, length = offsets.numel() - 1, 0
    tokens, sequences, bad = _C.ppo_loss_sequences(
        ppo_tokens(columns, mask), address(offsets), count, length, address(weights), address(log_ratios), threads()
    )
    if bad >= 0:
        raise ValueError(
            f"cu_seqlens holds {offsets[bad].item()} at position {bad}, "
            f"expected offsets that start at 0, never fall and end at {total}"
        )
    return PPOCounts(tokens, sequences, weights, log_ratios)


def ppo_loss_tokens(
    columns: dict[str, Tensor], mask: Tensor | None, options: PPOOptions, scale: float, wanted: Sequence[str]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """(sums over the unmasked tokens, fp32 gradients of the `wanted` columns times `scale`)."""
    gradients = {name: torch.empty(columns[name].shape, dtype=torch.float32) for name in wanted}
    sums = _C.ppo_loss_tokens(
        ppo_tokens(columns, mask), options.numbers(scale), options.choices(),
        *(address(gradients.get(name)) for name in ("logprobs", "values", "entropy")), threads(),
    )  # fmt: skip
    return dict(zip(PPO_SUMS, sums, strict=True)), gradients
