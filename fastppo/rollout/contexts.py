"""Attention over the paged cache: prompts that fill it, parts of sequences that go on, and one new token for each sequence.

Shapes as in `fastppo.model.attention`: T packed tokens, B sequences, Hq/Hkv query and key heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.model.attention import AttentionOptions, PackedContext, causal_attention, causal_mask
from fastppo.ops import decode_attention
from fastppo.rollout.pages import PAGE_SIZE, PagedCache
from fastppo.rollout.record import bounds_of


class PrefillContext(PackedContext):
    """Packed attention that also stores each layer's keys and values in the cache."""

    def __init__(self, bounds: list[int], cache: PagedCache, slots: Tensor) -> None:
        """slots: int64 [T], the place of each token in the cache."""
        super().__init__(bounds, slots.device)
        self._cache, self._slots = cache, slots

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        self._cache.write(layer, self._slots, k, v)
        return super().attend(layer, q, k, v, options)


class ChunkContext:
    """Parts of B sequences, side by side, whose earlier tokens are in the cache."""

    def __init__(self, past: list[int], cache: PagedCache, slots: list[Tensor]) -> None:
        """past: [B] earlier tokens. slots: [B] of int64 [past + new], the places of those and of the part's own."""
        self._cache, self._slots, self._past = cache, slots, past
        self._new = torch.cat([own[before:] for own, before in zip(slots, past, strict=True)])
        self._bounds = bounds_of(len(own) - before for own, before in zip(slots, past, strict=True))
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        self._cache.write(layer, self._new, k, v)
        found = []
        for i, slots in enumerate(self._slots):
            keys, values = (x[None] for x in self._cache.gather(layer, slots))
            queries = q[None, :, self._bounds[i] : self._bounds[i + 1]]
            found.append(causal_attention(queries, keys, values, options, self._mask(i, options.window))[0])
        return torch.cat(found, dim=1).transpose(0, 1)

    def _mask(self, sequence: int, window: int | None) -> Tensor:
        """bool [new, past + new]"""
        key = (sequence, window)
        if key not in self._masks:
            slots, past = self._slots[sequence], self._past[sequence]
            self._masks[key] = causal_mask(len(slots), window, slots.device, first=past)
        return self._masks[key]


class DecodeContext:
    """One new token for each of B sequences: T = B."""

    def __init__(self, cache: PagedCache, block_table: Tensor, lengths: Tensor) -> None:
        """block_table: int32 [B, blocks], each sequence's pages. lengths: int64 [B] tokens, the new one included."""
        self._cache, self._block_table, self._lengths = cache, block_table, lengths.int()
        block, offset = (lengths - 1) // PAGE_SIZE, (lengths - 1) % PAGE_SIZE
        self._slots = block_table.gather(1, block[:, None]).squeeze(1) * PAGE_SIZE + offset

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        k_pages, v_pages = self._cache.write(layer, self._slots, k, v)
        return decode_attention(
            q.transpose(0, 1), k_pages, v_pages, self._block_table, self._lengths,
            scale=options.scale, softcap=options.softcap, window=options.window, sinks=options.sinks,
        )  # fmt: skip
