"""Prompts, and one more token for every sequence, by the model's own modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastppo.model.attention import AttentionContext, run_trunk
from fastppo.model.host import on_device
from fastppo.native.batch_invariant_linear import batch_invariant_linear
from fastppo.ops._backends import FAST_DTYPES, choose
from fastppo.rollout.contexts import ChunkContext, DecodeContext, PrefillContext
from fastppo.rollout.pages import PAGE_SIZE, PagedCache
from fastppo.rollout.record import bounds_of

PREFILL_TOKENS = 8192
"""Most tokens of prompts in one forward of the modules; a longer prompt is run in chunks."""

CHUNK_TOKENS = 2048
"""Tokens of a chunk. It depends on nothing, so that a prompt's keys do not either."""


class Decoder(Protocol):
    def prefill(self, tokens: list[list[int]], pages: list[list[int]], past: list[int]) -> Tensor:
        """Run tokens of sequences that stand after `past` others whose keys and values are cached; `pages` are those of the whole sequence.

        Returns hidden [sequences, H] after their last tokens.
        """
        ...

    def step(self, tokens: Tensor, lengths: Tensor, block_table: Tensor) -> Tensor:
        """int64 tokens [B], the newest of sequences with `lengths` [B] tokens, int32 block_table [B, blocks] -> hidden [B, H]."""
        ...


class ModuleDecoder:
    """Runs the model's own modules. While it takes a step on a CPU, the model's plain linear layers call our kernel."""

    def __init__(self, model: PreTrainedModel, cache: PagedCache) -> None:
        self._model, self._cache = model, cache
        layers = (module for module in model.modules() if type(module) is nn.Linear and _is_served(module))
        self._linears = [(layer, _step_forward(layer)) for layer in layers]

    def prefill(self, tokens: list[list[int]], pages: list[list[int]], past: list[int]) -> Tensor:
        if any(past) or len(tokens) == 1 and len(tokens[0]) > PREFILL_TOKENS:
            return self._run_in_chunks(tokens, pages, past)
        bounds, device = bounds_of(map(len, tokens)), self._model.device
        slots = torch.cat([self._slots(len(own), where) for own, where in zip(tokens, pages, strict=True)])
        positions = torch.cat([torch.arange(len(own), dtype=torch.int64, device=device) for own in tokens])
        hidden = self._run(tokens, positions, PrefillContext(bounds, self._cache, slots))
        return hidden[on_device(bounds[1:], device) - 1]

    def _run_in_chunks(self, tokens: list[list[int]], pages: list[list[int]], past: list[int]) -> Tensor:
        """The next chunk of every sequence side by side, then the one after it, ..."""
        device = self._model.device
        slots = [self._slots(p + len(own), where) for own, where, p in zip(tokens, pages, past, strict=True)]
        last: list[Tensor | None] = [None] * len(tokens)
        for start in range(0, max(map(len, tokens)), CHUNK_TOKENS):
            live = [i for i, own in enumerate(tokens) if len(own) > start]
            chunks = [tokens[i][start : start + CHUNK_TOKENS] for i in live]
            begins = [past[i] + start for i in live]
            ends = [begin + len(chunk) for begin, chunk in zip(begins, chunks, strict=True)]
            ranges = zip(begins, ends, strict=True)
            positions = torch.cat([torch.arange(*each, dtype=torch.int64, device=device) for each in ranges])
            seen = [slots[i][:end] for i, end in zip(live, ends, strict=True)]
            hidden = self._run(chunks, positions, ChunkContext(begins, self._cache, seen))
            for i, end in zip(live, bounds_of(map(len, chunks))[1:], strict=True):
                last[i] = hidden[end - 1]
        return torch.stack(last)

    def _run(self, tokens: list[list[int]], positions: Tensor, context: AttentionContext) -> Tensor:
        flat = on_device([token for own in tokens for token in own], self._model.device)
        return run_trunk(self._model, flat, positions, context)

    def _slots(self, length: int, pages: list[int]) -> Tensor:
        """int64 [length]: the place in the cache of each of a sequence's first tokens."""
        device = self._model.device
        places = on_device(pages, device)[:, None] * PAGE_SIZE + torch.arange(
            PAGE_SIZE, dtype=torch.int64, device=device
        )
        return places.flatten()[:length]

    def step(self, tokens: Tensor, lengths: Tensor, block_table: Tensor) -> Tensor:
        context = DecodeContext(self._cache, block_table, lengths)
        for layer, forward in self._linears:
            layer.__dict__["forward"] = forward
        try:
            return run_trunk(self._model, tokens, lengths - 1, context)
        finally:
            for layer, _ in self._linears:
                del layer.__dict__["forward"]


def _is_served(layer: nn.Linear) -> bool:
    weight = layer.weight
    fits = "forward" not in layer.__dict__ and weight.is_contiguous() and weight.dtype in FAST_DTYPES
    return fits and weight.device.type == "cpu" and choose("batch_invariant_linear", weight) == "cpu"


def _step_forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight, bias = layer.weight, layer.bias

    def forward(x: Tensor) -> Tensor:
        return batch_invariant_linear(x, weight, bias) if x.dtype == weight.dtype else F.linear(x, weight, bias)

    return forward
