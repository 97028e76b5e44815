"""Allocates the outputs of `gae` and calls the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.native import _C, address, as_offsets, flat_float, on_cuda, sequences, steps, stream, threads


def place_in_sequences(position: int, offsets: Tensor) -> tuple[int, int]:
    """(sequence, step in it) of a flat position in packed tokens."""
    sequence = int(torch.searchsorted(offsets, position, right=True)) - 1
    return sequence, position - int(offsets[sequence])


def refuse_unbootstrapped_truncation(
    values: Tensor, mask: Tensor | None, dones: Tensor | None, truncated: Tensor, offsets: Tensor | None
) -> None:
    """ValueError where a step, kept and truncated and not done, is not its sequence's last kept one."""
    shape = sequences(values, offsets)
    bad = _C.first_unbootstrapped_truncation(steps(mask), steps(dones), steps(truncated), shape)
    if bad >= 0:
        row, step = divmod(bad, values.shape[1]) if offsets is None else place_in_sequences(bad, offsets)
        raise ValueError(
            f"truncated is set at step {step} of sequence {row}, which is not its last unmasked step; expected "
            "next_values with the value after every step (values' shape), not one value a sequence"
        )


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor | None, dones: Tensor | None, truncated: Tensor | None,
    next_values: Tensor | None, cu_seqlens: Tensor | None, decays: Tensor | None, gamma: float, decay: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(advantages, returns), fp32 in values' shape, [B, T] or packed [total]; all inputs where they lie.

    next_values: [B] or values' shape. decays: fp32 [B], gamma * lambda of each sequence; None: `decay` for all.
    """
    offsets = as_offsets(cu_seqlens, values.shape[0])
    each_step = next_values is not None and next_values.shape == values.shape
    bootstrap = None if next_values is None or each_step else flat_float(next_values)
    if truncated is not None and not each_step and not on_cuda(values):
        refuse_unbootstrapped_truncation(values, mask, dones, truncated, offsets)
        truncated = None  # the last step bootstraps from `bootstrap` anyway
    advantages, returns = (torch.empty(values.shape, dtype=torch.float32, device=values.device) for _ in range(2))
    kernel, where = (_C.cuda.gae, stream(values)) if on_cuda(values) else (_C.gae, threads())
    kernel(
        steps(rewards), steps(values), steps(next_values if each_step else None),
        steps(mask), steps(dones), steps(truncated), address(bootstrap), address(decays),
        gamma, decay, sequences(values, offsets), address(advantages), address(returns), where,
    )  # fmt: skip
    return advantages, returns
