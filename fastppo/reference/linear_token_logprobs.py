"""Token log-probabilities and entropy from hidden states and the head, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastppo.reference.token_logprobs import token_logprobs


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    tp_group: dist.ProcessGroup | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprobs` of the logits hidden @ weight.T + bias, in fp32 or wider.

    hidden [..., H], weight [V, H], labels [...], bias [V]; `options` are those of `token_logprobs`. With `tp_group` weight and bias are this
    rank's slice of the vocabulary, and the logits of all slices are gathered.
    """
    wide = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    keep = (labels != ignore_index).unsqueeze(-1)
    bias = None if bias is None else bias.to(wide)
    with torch.autocast(hidden.device.type, enabled=False):  # the product would be rounded to half precision
        # NaN in a row that is ignored reaches neither value nor the gradient of the weight.
        hidden = torch.where(keep, hidden, 0).to(wide)
        if tp_group is not None:
            hidden = _ToSlices.apply(hidden, tp_group)
        logits = torch.nn.functional.linear(hidden, weight.to(wide), bias)
        if tp_group is not None:
            logits = _WholeLogits.apply(logits, tp_group)
        return token_logprobs(logits, labels, ignore_index=ignore_index, **options)


class _ToSlices(torch.autograd.Function):
    """Itself forward; the sum over the ranks backward."""

    @staticmethod
    def forward(ctx, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, d_hidden: Tensor) -> tuple[Tensor, None]:
        total = d_hidden.contiguous().clone()
        if total.numel():
            dist.all_reduce(total, group=ctx.group)
        return total, None


class _WholeLogits(torch.autograd.Function):
    """[..., V_i] of every rank -> [..., V]; backward each rank's own part, since all bring the same gradient."""

    @staticmethod
    def forward(ctx, logits: Tensor, group: dist.ProcessGroup) -> Tensor:
        sizes: list[int] = [0] * dist.get_world_size(group)
        dist.all_gather_object(sizes, logits.shape[-1], group=group)
        rank = dist.get_rank(group)
        ctx.start, ctx.size = sum(sizes[:rank]), sizes[rank]
        if not logits.numel():
            return logits.new_empty((*logits.shape[:-1], sum(sizes)))
        padded = torch.nn.functional.pad(logits, (0, max(sizes) - ctx.size))
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded.contiguous(), group=group)
        return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], -1)

    @staticmethod
    def backward(ctx, d_logits: Tensor) -> tuple[Tensor, None]:
        return d_logits[..., ctx.start : ctx.start + ctx.size], None
