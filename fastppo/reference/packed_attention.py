"""Causal attention of packed sequences that may share prompts, in plain PyTorch."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    prompts: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v of each token over the tokens it sees: its sequence's prompt, then its own sequence up to itself.

    q [T, Hq, D], k and v [T, Hkv, D], cu_seqlens [S + 1], prompts [S] (-1: none) -> [T, Hq, D]. Query head h reads key head
    h // (Hq / Hkv). Of what it sees, a token with a window takes the last `window`. What it does not see is never multiplied, not even by 0.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    spans = list(pairwise(cu_seqlens.tolist()))
    places = [-1] * len(spans) if prompts is None else prompts.tolist()
    queries, keys, values = q.to(wide), k.to(wide), v.to(wide)
    rows = [queries[:0]]
    for (start, end), place in zip(spans, places, strict=True):
        first, last = spans[place] if place >= 0 else (start, start)
        seen_keys, seen_values = (torch.cat([x[first:last], x[start:end]]) for x in (keys, values))
        for row in range(start, end):
            length = last - first + row - start + 1
            seen = slice(0 if window is None else max(0, length - window), length)
            rows.append(_attend(queries[row], seen_keys[seen], seen_values[seen], scale).unsqueeze(0))
    return torch.cat(rows).to(q.dtype)


def _attend(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """query [Hq, D], keys and values [K, Hkv, D] -> [Hq, D]."""
    grouped = query.unflatten(0, (keys.shape[1], -1))  # [Hkv, group, D]
    scores = (grouped * keys.unsqueeze(2)).sum(-1) * scale  # [K, Hkv, group]
    return (scores.softmax(0).unsqueeze(-1) * values.unsqueeze(2)).sum(0).flatten(0, 1)
