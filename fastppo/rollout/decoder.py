"""Prompts, and one more token for every sequence, by the model's own modules.

On a CPU the linear layers are swapped for `batch_invariant_linear` while a step is taken.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastppo.model.packed import run_trunk
from fastppo.native.batch_invariant_linear import batch_invariant_linear
from fastppo.ops._backends import FAST_DTYPES, choose
from fastppo.rollout.contexts import ChunkContext, DecodeContext, PrefillContext
from fastppo.rollout.pages import PAGE_SIZE, PagedCache
from fastppo.rollout.record import on_device

PREFILL_TOKENS = 8192
"""Most prompt tokens in one forward of the modules; a longer prompt is run in chunks."""

CHUNK_TOKENS = 2048
"""Tokens of a chunk. It depends on nothing, so that a prompt's keys do not either."""


class Decoder(Protocol):
    def prefill(self, prompts: list[list[int]], pages: list[list[int]]) -> Tensor:
        """Run prompts, each with the pages that its keys and values go to -> hidden [prompts, H] after their last tokens."""
        ...

    def step(self, tokens: Tensor, lengths: Tensor, block_table: Tensor) -> Tensor:
        """int64 tokens [B], the newest of sequences with `lengths` [B] tokens, int32 block_table [B, blocks] -> hidden [B, H]."""
        ...


class ModuleDecoder:
    """Runs the model's own modules."""

    def __init__(self, model: PreTrainedModel, cache: PagedCache, switch: DecodeSwitch) -> None:
        self._model, self._cache, self._switch = model, cache, switch

    def prefill(self, prompts: list[list[int]], pages: list[list[int]]) -> Tensor:
        if len(prompts) == 1 and len(prompts[0]) > PREFILL_TOKENS:
            return self._run_in_chunks(prompts[0], pages[0])
        bounds = [0]
        for prompt in prompts:
            bounds.append(bounds[-1] + len(prompt))
        device = self._model.device
        slots = torch.cat([self._slots(*pair) for pair in zip(prompts, pages, strict=True)])
        tokens = on_device([token for prompt in prompts for token in prompt], device)
        positions = torch.cat([torch.arange(len(prompt), dtype=torch.int64, device=device) for prompt in prompts])
        hidden = run_trunk(self._model, tokens, positions, PrefillContext(bounds, self._cache, slots))
        return hidden[on_device(bounds[1:], device) - 1]

    def _run_in_chunks(self, prompt: list[int], pages: list[int]) -> Tensor:
        device = self._model.device
        tokens, slots = on_device(prompt, device), self._slots(prompt, pages)
        for start in range(0, len(tokens), CHUNK_TOKENS):
            end = min(start + CHUNK_TOKENS, len(tokens))
            context = ChunkContext(start, self._cache, slots[:end])
            positions = torch.arange(start, end, dtype=torch.int64, device=device)
            hidden = run_trunk(self._model, tokens[start:end], positions, context)
        return hidden[-1:]

    def _slots(self, prompt: list[int], pages: list[int]) -> Tensor:
        """int64 [tokens]: the place of each of the prompt's tokens in the cache."""
        device = self._model.device
        places = on_device(pages, device)[:, None] * PAGE_SIZE + torch.arange(
            PAGE_SIZE, dtype=torch.int64, device=device
        )
        return places.flatten()[: len(prompt)]

    def step(self, tokens: Tensor, lengths: Tensor, block_table: Tensor) -> Tensor:
        context = DecodeContext(self._cache, block_table, lengths)
        self._switch.decoding = True
        hidden = run_trunk(self._model, tokens, lengths - 1, context)
        self._switch.decoding = False
        return hidden


_ALONE: WeakKeyDictionary[nn.Module, threading.Lock] = WeakKeyDictionary()
_SAMPLING = threading.local()  # .models: those that this thread samples from just now
_MAKING = threading.Lock()


@contextmanager
def alone_with(model: nn.Module) -> Iterator[None]:
    """Inside the block no other thread samples from `model`: a call changes its modes and layers for its own time. Others wait.

    Raises RuntimeError where this very thread is sampling from it already, for which it would wait for ever.
    """
    mine = vars(_SAMPLING).setdefault("models", [])
    if any(other is model for other in mine):
        raise RuntimeError(
            "generate was called while this thread is sampling from the same model, expected it to have ended"
        )
    with _MAKING:
        lock = _ALONE.setdefault(model, threading.Lock())
    with lock:
        mine.append(model)
        try:
            yield
        finally:
            mine.pop()


class DecodeSwitch:
    """Whether the model is in a decode step just now."""

    decoding = False


@contextmanager
def decode_linears(model: nn.Module) -> Iterator[DecodeSwitch]:
    """Inside the block, the model's `nn.Linear` layers call our kernel while `switch.decoding` is set; afterwards they are as before.

    Only plain layers of a CPU model are touched: a subclass or a layer with a forward of its own stays what it is.
    """
    switch = DecodeSwitch()
    layers = [module for module in model.modules() if type(module) is nn.Linear and _is_served(module)]
    for layer in layers:
        layer.__dict__["forward"] = _forward(layer, switch)
    try:
        yield switch
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def _is_served(layer: nn.Linear) -> bool:
    weight = layer.weight
    fits = "forward" not in layer.__dict__ and weight.is_contiguous() and weight.dtype in FAST_DTYPES
    return fits and weight.device.type == "cpu" and choose("batch_invariant_linear", weight) == "cpu"


def _forward(layer: nn.Linear, switch: DecodeSwitch) -> Callable[[Tensor], Tensor]:
    weight, bias = layer.weight, layer.bias

    def forward(x: Tensor) -> Tensor:
        if switch.decoding and x.dtype == weight.dtype:
            return batch_invariant_linear(x, weight, bias)
        return F.linear(x, weight, bias)

    return forward
