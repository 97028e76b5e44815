"""A head whose vocabulary is sharded: ranks of a process group each hold a slice of its rows, in the order of the ranks.

p(v) = q_i p_i(v) with q_i, the probability of slice i, from the slices' log-sum-exps, and p_i within the slice. So log p(v) = log q_i + log p_i(v),
and the entropy is sum_i q_i (H_i - log q_i). What ranks exchange is a few numbers a row; logits stay where they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

IGNORED = -100
"""Label of a row that is left out, once labels count from a slice's own beginning."""


class Slices(NamedTuple):
    """Where the slices end, int64 [ranks] on the device of the labels, which of them is this rank's, and how many rows that has."""

    ends: Tensor
    own: int
    size: int

    @classmethod
    def of(cls, weight: Tensor, labels: Tensor, group: dist.ProcessGroup) -> Slices:
        """One gather of 16 bytes a rank. Raises ValueError where ranks bring different numbers of labels (on the CPU, where looking is free)."""
        own = torch.tensor([len(weight), labels.numel()], dtype=torch.int64, device=labels.device)
        sizes, rows = gathered(own, group).unbind(1)
        if labels.device.type == "cpu" and len(rows.unique()) > 1:
            raise ValueError(f"labels are {rows.tolist()} on the ranks of tp_group, expected the same labels on all")
        return cls(sizes.cumsum(0), dist.get_rank(group), len(weight))

    @property
    def vocabulary(self) -> int:
        """Of all slices together."""
        return int(self.ends[-1])

    def owners(self, labels: Tensor) -> Tensor:
        """int64 [...]: the rank whose slice holds each label; the number of ranks where none does."""
        found = torch.bucketize(labels, self.ends, right=True)
        return torch.where(labels < 0, len(self.ends), found)

    def local(self, labels: Tensor, ignored: Tensor, elsewhere: int) -> Tensor:
        """Labels counted from the beginning of this rank's slice, `elsewhere` in place of those that others hold."""
        counted = labels - (self.ends[self.own] - self.size)
        counted = torch.where(self.owners(labels) == self.own, counted, elsewhere)
        return torch.where(ignored, IGNORED, counted)


class Merged(NamedTuple):
    """fp32 [...] of the whole vocabulary; max_logsum [..., 2]."""

    logprobs: Tensor
    entropy: Tensor
    max_logsum: Tensor


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, ...]: what every rank has, in their order."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.stack(parts)


def merge(
    logprobs: Tensor, entropy: Tensor | None, max_logsum: Tensor, owners: Tensor, group: dist.ProcessGroup
) -> Merged:
    """Of what each rank found in its slice, the whole vocabulary's; every rank gets the same bits.

    logprobs, entropy: fp32 [...], within the slice. max_logsum: [..., 2]. owners: int64 [...], as `Slices.owners` gives them.
    """
    own = [logprobs, *max_logsum.unbind(-1), *([] if entropy is None else [entropy])]
    found = gathered(torch.stack(own), group).double()  # [ranks, 3 or 4, ...]
    within, peaks, sums = found[:, 0], found[:, 1], found[:, 2]
    lse = peaks + sums
    top, first = lse.max(0)
    # The largest slice's own 1 stays out of the sum, so that the others keep their digits where they are small.
    others = torch.arange(len(lse), dtype=torch.int64, device=lse.device).view(-1, *[1] * first.dim()) != first
    rest = torch.where(others, (lse - top).exp(), 0).sum(0)
    log_q = (lse - top) - rest.log1p()
    places = owners.clamp(max=len(lse) - 1)[None]
    banned = lse.gather(0, places)[0] == -torch.inf  # a slice of -inf alone has no distribution of its own
    chosen = (within + log_q).gather(0, places)[0].masked_fill(banned, -torch.inf)
    odd = ~top.isfinite() | (owners == len(lse))
    peak = peaks.amax(0)
    merged_entropy = torch.zeros_like(top)
    if entropy is not None:
        merged_entropy = torch.where(lse == -torch.inf, 0, log_q.exp() * (found[:, 3] - log_q)).sum(0)
        merged_entropy = merged_entropy.masked_fill(~top.isfinite(), torch.nan)
    log_sum = (top - peak) + rest.log1p()
    return Merged(
        chosen.masked_fill(odd, torch.nan).float(), merged_entropy.float(), torch.stack([peak, log_sum], -1).float()
    )
