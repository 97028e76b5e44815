"""Generalised advantage estimation over padded or packed sequences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.native import gae as native
from fastppo.ops import _checks
from fastppo.ops._backends import choose
from fastppo.ops._registry import custom_op
from fastppo.reference import gae as reference


class GAE(NamedTuple):
    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float,
    lam: float | Tensor,
    dones: Tensor | None = None,
    truncated: Tensor | None = None,
    next_values: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> GAE:
    """Advantages and returns (Schulman et al. 2016, arXiv:1506.02438, eq. 11-16), not differentiable:

        delta_t = r_t + gamma * V_{t+1} - V_t,   A_t = delta_t + gamma * lam * A_{t+1},   return_t = A_t + V_t

    Every input is read once, where it lies: a transposed time-major tensor costs no copy. On the CPU each sequence has
    the bits of the sequential fp32 recursion, whatever the batch, padding, packing or threads. The CUDA kernel composes
    steps in parallel, so its roundings differ, but a sequence has the same bits in every batch and packing (not in other
    padding).

    Args:
        rewards, values: [B, T], or packed [total] with `cu_seqlens`; float32, bfloat16 or float16 (float64 runs in the
            reference). values[t] is V of the state before step t.
        mask: bool in values' shape; None keeps all. Steps left out, wherever they are, carry V_{t+1} and A_{t+1}
            through to the step before (verl's semantics), and nothing that lies there (NaN, flags) reaches anything.
        gamma: discount in [0, 1].
        lam: float in [0, 1], or a tensor [B] with one for each sequence (not checked).
        dones: bool in values' shape: the episode terminates after this step. V_{t+1} = A_{t+1} = 0.
        truncated: bool in values' shape: the episode is cut off after this step. A_{t+1} = 0 and V_{t+1} from
            `next_values`, which must then be given. Where `dones` is set too, `dones` wins.
        next_values: values' shape: V of the state that each step led to, used for every V_{t+1} (torchrl's convention;
            where environments reset themselves, values[t + 1] after a cut belongs to the next episode). Or [B]: V after
            each sequence's last unmasked step; then `truncated` may be set at that step only, as no other cut has a
            value. None: 0 after the last step. (Packed, with as many sequences as tokens, [B] is read as [total].)
        cu_seqlens: int32 or int64 [B + 1]: sequence i is [cu_seqlens[i], cu_seqlens[i + 1]) of the packed tensors;
            sequences may be empty.

    Returns:
        `GAE(advantages, returns)`: float32 (float64 for float64) in values' shape, 0 at steps left out.

    Raises:
        TypeError, ValueError: wrong type, shape or device, gamma or lam outside [0, 1], `truncated` without
            `next_values`; on the CPU also wrong offsets (on a GPU all results are NaN) and a truncated step without a value
            (NaN at that step and where it reaches).
    """
    _check_inputs(rewards, values, mask, dones, truncated, next_values, cu_seqlens)
    gamma = _checks.number("gamma", gamma, at_least=0, at_most=1)
    sequences = values.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _check_lam(lam, sequences, values)
    if choose("gae", *(x for x in (values, rewards, next_values) if x is not None)) == "reference":
        if cu_seqlens is not None:
            _checks.offsets_in_order("cu_seqlens", cu_seqlens, values.shape[0])
        options = {"dones": dones, "truncated": truncated, "next_values": next_values, "cu_seqlens": cu_seqlens}
        return GAE(*reference.gae(rewards, values, mask, gamma=gamma, lam=lam, **options))
    decay, decays = (0.0, (gamma * lam.double()).float()) if isinstance(lam, Tensor) else (gamma * lam, None)
    return GAE(*_gae(rewards, values, mask, dones, truncated, next_values, cu_seqlens, decays, gamma, decay))


def _check_inputs(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    truncated: Tensor | None,
    next_values: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    _checks.floating("values", values)
    _checks.floating("rewards", rewards)
    if cu_seqlens is not None:
        _checks.cu_seqlens("cu_seqlens", cu_seqlens, "values", values)
    elif values.dim() != 2:
        raise ValueError(f"values has shape {list(values.shape)}, expected [B, T], or [total] with cu_seqlens")
    _checks.shape("rewards", rewards, values.shape, "values' shape")
    for name, flags in (("mask", mask), ("dones", dones), ("truncated", truncated)):
        if flags is not None:
            _checks.mask(name, flags)
            _checks.shape(name, flags, values.shape, "values' shape")
            _checks.same_device(name, flags, "values", values)
    _checks.same_device("rewards", rewards, "values", values)
    if truncated is not None and next_values is None:
        raise ValueError("truncated is given but next_values is None, expected the values to bootstrap from")
    if next_values is not None:
        _check_next_values(next_values, values, cu_seqlens)


def _check_next_values(next_values: Tensor, values: Tensor, cu_seqlens: Tensor | None) -> None:
    _checks.floating("next_values", next_values)
    _checks.same_device("next_values", next_values, "values", values)
    sequences = values.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if next_values.shape not in (values.shape, (sequences,)):
        raise ValueError(
            f"next_values has shape {list(next_values.shape)}, "
            f"expected [{sequences}] (one a sequence) or {list(values.shape)} (values' shape)"
        )


def _check_lam(lam: float | Tensor, sequences: int, values: Tensor) -> None:
    if not isinstance(lam, Tensor):
        _checks.number("lam", lam, at_least=0, at_most=1)
        return
    _checks.floating("lam", lam)
    _checks.shape("lam", lam, (sequences,), "one a sequence")
    _checks.same_device("lam", lam, "values", values)


@custom_op("gae")
def _gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    truncated: Tensor | None,
    next_values: Tensor | None,
    cu_seqlens: Tensor | None,
    decays: Tensor | None,
    gamma: float,
    decay: float,
) -> tuple[Tensor, Tensor]:
    return native.gae(rewards, values, mask, dones, truncated, next_values, cu_seqlens, decays, gamma, decay)


@torch.library.register_fake("fastppo::gae")
def _(rewards, values, mask, dones, truncated, next_values, cu_seqlens, decays, gamma, decay):
    return values.new_empty(values.shape, dtype=torch.float32), values.new_empty(values.shape, dtype=torch.float32)
