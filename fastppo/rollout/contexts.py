"""Attention over the paged cache: prompts that fill it, long prompts in chunks, and one new token for each sequence.

Shapes as in `fastppo.model.attention`: T packed tokens, B sequences, Hq/Hkv query and key heads, D head size.
"""

from __future__ import annotations

from torch import Tensor

from fastppo.model.attention import AttentionOptions, PackedContext, causal_attention, causal_mask
from fastppo.ops import decode_attention
from fastppo.rollout.pages import PAGE_SIZE, PagedCache


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
    """A part of one long prompt, whose earlier tokens are in the cache."""

    def __init__(self, past: int, cache: PagedCache, slots: Tensor) -> None:
        """past: earlier tokens. slots: int64 [past + T], the places of those and of the chunk's."""
        self._cache, self._slots, self._past = cache, slots, past
        self._masks: dict[int | None, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor:
        self._cache.write(layer, self._slots[self._past :], k, v)
        keys, values = (x[None] for x in self._cache.gather(layer, self._slots))
        return causal_attention(q[None], keys, values, options, self._mask(options.window))[0].transpose(0, 1)

    def _mask(self, window: int | None) -> Tensor:
        """bool [T, past + T]"""
        if window not in self._masks:
            self._masks[window] = causal_mask(len(self._slots), window, self._slots.device, first=self._past)
        return self._masks[window]


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
