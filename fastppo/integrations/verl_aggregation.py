"""How verl makes one number of its tokens' losses: its modes and totals as `ppo_loss` has them, and the dtypes of what comes out."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastppo.ops import _checks


def aggregation_of(
    keep: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> dict[str, Any]:
    """verl's mode and its totals as `ppo_loss` has them: aggregation and denominator."""
    _checks.number("dp_size", dp_size, above=0)
    if loss_agg_mode == "token-sum":
        return {"aggregation": "fixed-denominator", "denominator": 1 / dp_size}
    by_sequence = "seq-mean-token-sum", "seq-mean-token-mean"
    aggregation = loss_agg_mode.removesuffix("-norm")
    _checks.choice("loss_agg_mode", aggregation, ("token-mean", *by_sequence))
    total = global_batch_size if aggregation in by_sequence else batch_num_tokens
    if total is None and dp_size > 1:
        raise ValueError(f"dp_size is {dp_size}, expected 1 without the global batch's total")
    denominator = None if total is None else _checks.number("the global batch's total", total, above=0) / dp_size
    if loss_agg_mode == "seq-mean-token-sum-norm":
        scale = keep.shape[-1] if loss_scale_factor is None else loss_scale_factor
        _checks.number("loss_scale_factor", scale, above=0)
        denominator = scale * (keep.any(-1).sum().clamp(min=1) if denominator is None else denominator)
    elif loss_agg_mode.endswith("-norm"):
        raise ValueError(f"loss_agg_mode is {loss_agg_mode!r}, which is none of verl's")
    return {"aggregation": aggregation, "denominator": denominator}


def aggregate(x: Tensor, keep: Tensor, aggregation: str, denominator: float | Tensor | None) -> Tensor:
    """fp32 0-d (fp64 for fp64), 0 for an empty mask."""
    _checks.floating("the losses", x)
    _checks.shape("the mask", keep, x.shape, "the losses' shape")
    wide = torch.promote_types(torch.float32, x.dtype)
    kept = torch.where(keep, x, 0)
    if aggregation == "seq-mean-token-mean":
        total = (kept.sum(-1, dtype=wide) / keep.sum(-1).clamp(min=1)).sum()
    else:
        total = kept.sum(dtype=wide)
    if denominator is None:
        own = keep.sum() if aggregation == "token-mean" else keep.any(-1).sum()
        denominator = own.clamp(min=1)
    return total / denominator


def loss_dtype(loss_agg_mode: str, *tensors: Tensor) -> torch.dtype:
    """Of the tensors, the mask among them; verl counts sequences in fp32."""
    dtype = promoted(*tensors)
    return dtype if loss_agg_mode.startswith("token") else torch.promote_types(dtype, torch.float32)


def mean_dtype(*tensors: Tensor) -> torch.dtype:
    """Of the tensors, the mask last: one of integers is counted in the default type."""
    count = tensors[-1].dtype if tensors[-1].is_floating_point() else torch.get_default_dtype()
    return torch.promote_types(promoted(*tensors), count)


def promoted(*tensors: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors))
