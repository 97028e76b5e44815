"""The rotary embedding of heads at their positions, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Of the first R elements of each head, i of the first half and i of the second turned by one angle (arXiv:2104.09864, eq. 34):

        first' = first cos - second sin,   second' = second cos + first sin

    x [N, heads, D], cos and sin [P, R], R <= D even, positions [N] -> [N, heads, D] in x's type, computed in fp32 or wider. As in Transformers'
    Llama, where the two halves of a row of cos and sin are equal. A position outside of [0, P) makes what is turned NaN.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    outside = ((positions < 0) | (positions >= len(cos)))[:, None]
    place = positions.clamp(0, len(cos) - 1)
    cos, sin = (table[place].to(wide).masked_fill(outside, torch.nan)[:, None] for table in (cos, sin))
    turned, kept = x[..., : cos.shape[-1]].to(wide), x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned.to(x.dtype), kept], dim=-1)
