"""Attention of one new token a sequence over a paged key-value cache, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(softcap * tanh(scale * q k^T / softcap)) v over each sequence's own keys.

    q [B, Hq, D], k_pages [P, page, Hkv, D], v_pages [P, page, Hkv, Dv], block_table [B, blocks], context_lens [B] -> [B, Hq, Dv].
    Query head h reads key head h // (Hq / Hkv). `sinks` [Hq] are logits of a key whose value is 0.
    """
    pages, page, kv_heads, _ = k_pages.shape
    batch, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    table = block_table.long().clamp(0, pages - 1)  # entries beyond a sequence's length may hold anything
    keys = (
        k_pages[table].flatten(1, 2).to(wide).repeat_interleave(heads // kv_heads, dim=2)
    )  # [B, blocks * page, Hq, D]
    values = v_pages[table].flatten(1, 2).to(wide).repeat_interleave(heads // kv_heads, dim=2)
    position = torch.arange(keys.shape[1], dtype=torch.int64, device=q.device)
    lens = context_lens.long()[:, None]
    visible = position < lens
    if window is not None:
        visible = visible & (position >= lens - window)
    keys = torch.where(visible[..., None, None], keys, 0)  # what lies in unused places may be NaN
    values = torch.where(visible[..., None, None], values, 0)
    with torch.autocast(q.device.type, enabled=False):  # the products would be rounded to half precision
        scores = torch.einsum("bhd,bkhd->bhk", q.to(wide), keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible[:, None], -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(wide)[None, :, None].expand(batch, -1, 1)], dim=-1)
            values = torch.cat([values, values.new_zeros(batch, 1, heads, values.shape[-1])], dim=1)
        weights = torch.where((lens > 0)[..., None], scores, 0).softmax(-1)
        out = torch.einsum("bhk,bkhd->bhd", weights, values)
    return torch.where((lens > 0)[..., None], out, 0).to(q.dtype)


def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """k, v [T, Hkv, D] into place `slots` [T] = page * page_size + offset of the caches, in place; a negative slot is skipped."""
    kept = slots >= 0
    places = slots[kept].long()
    page, offset = places // k_pages.shape[1], places % k_pages.shape[1]
    k_pages[page, offset] = k[kept].to(k_pages.dtype)
    v_pages[page, offset] = v[kept].to(v_pages.dtype)
