"""Token log-probabilities and entropy from hidden states and the head, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastppo.reference.token_logprobs import token_logprobs


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprobs` of the logits hidden @ weight.T + bias, in fp32 or wider.

    hidden [..., H], weight [V, H], labels [...], bias [V]; `options` are those of `token_logprobs`.
    """
    wide = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    keep = (labels != ignore_index).unsqueeze(-1)
    bias = None if bias is None else bias.to(wide)
    with torch.autocast(hidden.device.type, enabled=False):  # the product would be rounded to half precision
        # NaN in a row that is ignored reaches neither value nor the gradient of the weight.
        logits = torch.nn.functional.linear(torch.where(keep, hidden, 0).to(wide), weight.to(wide), bias)
        return token_logprobs(logits, labels, ignore_index=ignore_index, **options)
