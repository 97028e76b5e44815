"""Generalised advantage estimation, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


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
) -> tuple[Tensor, Tensor]:
    """Schulman et al. 2016 (arXiv:1506.02438), eq. 11-16, as a recursion backwards in time:

        delta_t = r_t + gamma * V_{t+1} - V_t
        A_t     = delta_t + gamma * lam * A_{t+1}
        return_t = A_t + V_t

    rewards, values [B, T] floating, or packed [total] with cu_seqlens [B + 1] -> fp32 advantages and returns of that
    shape (fp64 if any input is). lam: float or [B]. mask, dones, truncated: bool in values' shape; next_values: [B] or
    values' shape.

    A step outside the mask gives 0 and hands (V_{t+1}, A_{t+1}) through to the step before it. After a done step
    V_{t+1} and A_{t+1} are 0; after a truncated one A_{t+1} is 0. V_{t+1} is next_values at t where every step has one;
    otherwise the value of the next step inside the mask, and after the last such step next_values of the sequence
    (None: 0). Without a value for every step, a truncation elsewhere than there has nothing to bootstrap from:
    ValueError on the CPU, NaN on a GPU.
    """
    if cu_seqlens is not None:
        return _packed(rewards, values, mask, cu_seqlens, gamma, lam, dones, truncated, next_values)
    inputs = (rewards, values) if next_values is None else (rewards, values, next_values)
    dtype = torch.float64 if torch.float64 in (x.dtype for x in inputs) else torch.float32
    keep = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    rewards, values = (torch.where(keep, x, 0).to(dtype) for x in (rewards, values))
    done = torch.zeros_like(keep) if dones is None else dones & keep
    cut = done if truncated is None else done | truncated & keep
    decay = (gamma * lam.double()).to(dtype) if isinstance(lam, Tensor) else gamma * lam
    each_step = next_values is not None and next_values.dim() == 2
    if each_step:
        next_values = torch.where(keep & ~done, next_values, 0).to(dtype)
    else:
        rewards = torch.where(_cut_before_a_later_step(cut & ~done, keep), torch.nan, rewards)

    advantage = torch.zeros_like(values[:, :1].sum(1))
    next_value = advantage if each_step or next_values is None else next_values.to(dtype)
    advantages: list[Tensor] = []
    for t in reversed(range(values.shape[1])):
        following = next_values[:, t] if each_step else torch.where(done[:, t], 0, next_value)
        delta = rewards[:, t] + gamma * following - values[:, t]
        new = delta + decay * torch.where(cut[:, t], 0, advantage)
        advantage = torch.where(keep[:, t], new, advantage)
        next_value = torch.where(keep[:, t], values[:, t], next_value)
        advantages.append(torch.where(keep[:, t], new, 0))
    result = torch.stack(advantages[::-1], dim=1) if advantages else torch.zeros_like(values)
    return result, torch.where(keep, result + values, 0)


def _cut_before_a_later_step(cut: Tensor, keep: Tensor) -> Tensor:
    """Steps of `cut` [B, T] with another kept step after them: with one bootstrap value a sequence they have none."""
    later = keep.flip(1).cumsum(1).flip(1) > keep
    bad = cut & later
    if bad.device.type == "cpu" and bad.any():
        row, step = bad.nonzero()[0].tolist()
        raise ValueError(
            f"truncated is set at step {step} of sequence {row}, which is not its last unmasked step; expected "
            "next_values with the value after every step (values' shape), not one value a sequence"
        )
    return bad


def _packed(rewards, values, mask, cu_seqlens, gamma, lam, dones, truncated, next_values) -> tuple[Tensor, Tensor]:
    """Right-pads the sequences (padding is masked, so it carries everything through) and packs the result again."""
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.long().diff()
    step = torch.arange(int(lengths.max()) if len(lengths) else 0, dtype=torch.int64, device=values.device)
    inside = step < lengths[:, None]
    index = torch.where(inside, starts[:, None] + step, 0)

    def padded(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.shape != values.shape else x[index]

    keep = inside if mask is None else inside & mask[index]
    results = gae(
        padded(rewards),
        padded(values),
        keep,
        gamma=gamma,
        lam=lam,
        dones=padded(dones),
        truncated=padded(truncated),
        next_values=padded(next_values),
    )
    return results[0][inside], results[1][inside]
