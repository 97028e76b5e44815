"""The model that is sampled from, as the sampler holds it: who may use it, the cache's memory, and what takes its steps."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from fastppo.model.attention import ObservingContext, run_trunk
from fastppo.model.divided import least_in, team_of
from fastppo.model.packed import evaluating
from fastppo.model.parts import LlamaParts, is_exact, parts_of
from fastppo.rollout.decoder import Decoder, ModuleDecoder
from fastppo.rollout.graphs import GraphDecoder
from fastppo.rollout.pages import PAGE_SIZE, PagedCache, bytes_per_page, device_memory, kv_budget, pages_for
from fastppo.rollout.parts_decoder import parts_agree, parts_decoder

GRAPHED = ("cuda",)  # device types whose decode steps are replayed as graphs


class ModelRunner:
    """Lends a cache and a decoder of one model. Lending, and the decoder's steps, belong into a block of `alone`."""

    def __init__(self, model: PreTrainedModel, kv_memory: float | Literal["auto"], keep_cache: bool | float) -> None:
        self.model, self.kv_memory, self.keep_cache = model, kv_memory, keep_cache
        self._team = team_of(model)  # all of which sample from it at once
        self._seen: dict[tuple[torch.dtype, torch.device], ObservingContext] = {}
        self._agrees: bool | None = None  # whether steps of our own give what the model's modules give, once known
        self.kept_cache: PagedCache | None = None
        self.kept_graphs: GraphDecoder | None = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, this thread alone samples from the model, which is in evaluation mode. Other threads wait.

        Also in a caller's `torch.inference_mode()` the tensors made here are plain ones: a kept cache is written to later, and a loss may need
        what was sampled. A caller's `torch.autocast` is off: the model samples in its weights' type, with the bits that it has elsewhere.
        """
        unrounded = torch.autocast(self.model.device.type, enabled=False)
        with (
            _alone_with(self.model),
            torch.inference_mode(mode=False),
            unrounded,
            torch.no_grad(),
            evaluating(self.model),
        ):
            yield

    @contextmanager
    def lend(self, rows: int, positions: int, *, pages: int) -> Iterator[tuple[PagedCache, Decoder]]:
        """For at most `rows` sequences side by side of at most `positions` tokens: at most `pages` pages, as many as the budget holds."""
        cache = self._cache(pages)
        decoder = self._decoder(cache, rows=rows, positions=positions)
        try:
            yield cache, decoder
        finally:
            if cache.bytes <= self.keep_cache * device_memory(self.model.device):
                self.kept_cache, self.kept_graphs = cache, decoder if self._outlasts_updates(decoder) else None

    def _cache(self, pages: int) -> PagedCache:
        cache, self.kept_cache = self.kept_cache, None
        shapes = self.look().shapes
        if cache is not None and cache.shapes != shapes:
            cache = None
        budget = kv_budget(self.kv_memory, self.model.device) // bytes_per_page(shapes)
        if self.kv_memory == "auto" and cache is not None:
            budget += cache.pages
        pages = min(pages, least_in(self._team, budget))
        if cache is None or cache.pages < pages:
            cache = self.kept_graphs = None  # their memory is free before the new one takes some
            cache = PagedCache(shapes, pages, self.model.device)
        return cache

    def look(self) -> ObservingContext:
        """What each layer keeps of a token and how it attends, seen in a forward of one token and remembered while type and device stay."""
        key = (self.model.dtype, self.model.device)
        if key not in self._seen:
            context = ObservingContext([0, 1], self.model.device)
            zero = torch.zeros(1, dtype=torch.int64, device=self.model.device)
            run_trunk(self.model, zero, zero, context)
            self._seen, self._agrees = {key: context}, None
        return self._seen[key]

    def _decoder(self, cache: PagedCache, *, rows: int, positions: int) -> Decoder:
        """On a GPU graphs of its steps: those at hand while they fit, which they do as long as the cache is kept."""
        blocks, parameters = pages_for(positions), list(self.model.parameters())
        graphs, self.kept_graphs = self.kept_graphs, None
        if graphs is not None:
            if graphs.serves(parameters, cache, rows=rows, blocks=blocks):
                return graphs
            rows, blocks = graphs.at_least(rows, blocks)
        decoder: Decoder = ModuleDecoder(self.model, cache)
        parts = self._parts()
        if parts is not None:
            sizes = {"rows": rows, "positions": blocks * PAGE_SIZE}
            decoder = parts_decoder(parts, decoder, cache, self.look(), **sizes, exact=is_exact(self.model))
        if self.model.device.type not in GRAPHED or self._team is not None:
            return decoder
        return GraphDecoder(decoder, parameters, cache, rows=rows, blocks=blocks, device=self.model.device)

    def _outlasts_updates(self, decoder: Decoder) -> bool:
        """Whether it is graphs that read the live parameters, not a copy with adapters merged in."""
        parts = self._parts()
        return isinstance(decoder, GraphDecoder) and (parts is None or not parts.has_adapters)

    def _parts(self) -> LlamaParts | None:
        """The model as parts, where it has them and they give what its modules give."""
        parts = parts_of(self.model)
        if parts is None:
            return None
        if self._agrees is None:
            self._agrees = parts_agree(parts, self.model, self.look())
        return parts if self._agrees else None


_ALONE: WeakKeyDictionary[nn.Module, threading.Lock] = WeakKeyDictionary()
_SAMPLING = threading.local()  # .models: those that this thread samples from just now
_MAKING = threading.Lock()


@contextmanager
def _alone_with(model: nn.Module) -> Iterator[None]:
    """Inside the block no other thread samples from `model`: a call changes its modes and layers for its own time. Others wait.

    Raises RuntimeError where this very thread is sampling from it already, for which it would wait for ever.
    """
    mine = vars(_SAMPLING).setdefault("models", [])
    if any(other is model for other in mine):
        raise RuntimeError("this thread is sampling from the same model already, expected that call to have ended")
    with _MAKING:
        lock = _ALONE.setdefault(model, threading.Lock())
    with lock:
        mine.append(model)
        try:
            yield
        finally:
            mine.pop()
