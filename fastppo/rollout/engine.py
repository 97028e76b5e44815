"""Sampling with a key-value cache on the very model that trains: its parameters are read where they lie, at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastppo.model.attention import ObservingContext
from fastppo.model.packed import evaluating, require_prepared, run_trunk
from fastppo.model.parts import LlamaParts, UnlikeLlama
from fastppo.model.prepare import prepare_model
from fastppo.ops import _checks
from fastppo.rollout.decoder import Decoder, DecodeSwitch, ModuleDecoder, alone_with, decode_linears
from fastppo.rollout.generation import (
    Generation,
    GenerationStats,
    OnTokens,
    Progress,
    new_token_limits,
    pages_needed,
)
from fastppo.rollout.graphs import GraphDecoder
from fastppo.rollout.pages import PAGE_SIZE, PagedCache, bytes_per_page, kv_budget, pages_for
from fastppo.rollout.parts_decoder import parts_agree, parts_decoder
from fastppo.rollout.prompts import encode_prompts
from fastppo.rollout.rollout import Rollout
from fastppo.rollout.sampling import SamplingParams
from fastppo.rollout.stopping import StopStrings, stop_ids


class Engine:
    """Samples completions of many prompts side by side.

    Each prompt is run once for all its samples, which share its pages of the key-value cache. Up to `max_batch_size` sequences decode
    together, and a finished one makes room for the next. All state of a call lives in the call: an exception or Ctrl-C in the middle
    leaves the engine as it was.

    `stats` tells what the last call did.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_batch_size: int = 64,
        kv_memory: float | Literal["auto"] = "auto",
        keep_cache: bool = False,
    ) -> None:
        """Takes a model to sample from.

        Args:
            model: any causal LM that `prepare_model` accepts (it is called here); its weights are shared, never copied.
            tokenizer: needed for prompts given as text and for stop strings; what it and its chat template end a text with ends completions.
            max_batch_size: most sequences side by side.
            kv_memory: most GiB for keys and values; "auto" takes from what is free (a GPU's memory: 80 %, a CPU's: half). Sequences that
                do not fit wait; none is thrown out.
            keep_cache: keep the cache's memory, and on a GPU the CUDA graphs of the decode steps, between calls instead of giving it
                back after each.
        """
        if isinstance(max_batch_size, bool) or not isinstance(max_batch_size, int) or max_batch_size < 1:
            raise ValueError(f"max_batch_size is {max_batch_size!r}, expected an integer >= 1")
        if kv_memory != "auto":
            _checks.number("kv_memory", kv_memory, above=0)
        self.model = prepare_model(model)
        self.tokenizer = tokenizer
        self.max_batch_size = max_batch_size
        self.kv_memory, self.keep_cache = kv_memory, keep_cache
        self.stats = GenerationStats()
        self._seen: dict[tuple[torch.dtype, torch.device], ObservingContext] = {}
        self._agrees: bool | None = None  # whether steps of our own give what the model's modules give, once known
        self._cache: PagedCache | None = None
        self._graphs: GraphDecoder | None = None

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]] | Sequence[str] | Mapping[str, Any],
        sampling: SamplingParams,
        *,
        progress: Progress | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Rollout:
        """`sampling.n` completions of every prompt: all of the first prompt, then all of the second, ...

        Args:
            prompts: texts (encoded by the tokenizer with its special tokens, but for an end of sequence), lists of token ids, a tensor or array
                without padding, or a tokenizer's output with its `attention_mask`: see `encode_prompts`.
            progress: called with (finished sequences, all sequences) whenever some finish.
            on_tokens: called after every step with its [(sequence number, new token), ...].

        Returns:
            A Rollout on the model's device with sampling log-probabilities. Up to rounding, a completion depends only on the weights,
            its prompt, the seed and its number (prompt number * n + sample); of a Llama-like fp32 model on a CPU, to the last bit.

        Raises:
            TypeError, ValueError: no prompt, an empty or padded prompt or one that leaves no room in the model's context, an id outside the
            vocabulary, text or stop strings without a tokenizer, a sequence that alone needs more than `kv_memory`.
            RuntimeError: called from a callback of a call on the same model. Other threads wait for each other, whatever engine they use.
        """
        require_prepared(self.model)
        if sampling.stop_strings and self.tokenizer is None:
            raise ValueError("sampling.stop_strings needs a tokenizer: Engine(model, tokenizer)")
        token_lists = encode_prompts(prompts, self.model, self.tokenizer)
        stops = stop_ids(self.model, self.tokenizer, sampling)
        slots = min(self.max_batch_size, len(token_lists) * sampling.n)
        with alone_with(self.model):
            parts = self._parts()  # the model as it is, before its layers are swapped
            with evaluating(self.model), decode_linears(self.model) as switch:
                cache = self._make_cache(token_lists, sampling)
                limits = new_token_limits(self.model, token_lists, sampling)
                longest = max(len(tokens) + limit for tokens, limit in zip(token_lists, limits, strict=True))
                generation = Generation(
                    self.model,
                    cache,
                    self._make_decoder(parts, cache, switch, rows=slots, positions=longest),
                    token_lists,
                    sampling,
                    slots=slots,
                    stop_ids=sorted(stops),
                    stop_strings=StopStrings(self.tokenizer, sampling.stop_strings) if sampling.stop_strings else None,
                    progress=progress,
                    on_tokens=on_tokens,
                )
                self.stats = generation.stats
                return generation.run()

    def _make_cache(self, prompts: list[list[int]], sampling: SamplingParams) -> PagedCache:
        """As many pages as the call can use, within the budget."""
        limits = new_token_limits(self.model, prompts, sampling)
        least = pages_needed(prompts, limits, sampling)
        slots = min(self.max_batch_size, len(prompts) * sampling.n)
        useful = slots * max(pages_for(len(p) + n) for p, n in zip(prompts, limits, strict=True)) + max(least)
        shapes = self._look().shapes
        if self._cache is not None and self._cache.shapes != shapes:
            self._cache = None
        page_bytes = bytes_per_page(shapes)
        budget = kv_budget(self.kv_memory, self.model.device) // page_bytes
        if self.kv_memory == "auto" and self._cache is not None:
            budget += self._cache.pages
        pages = min(useful, budget)
        if max(least) > pages:
            i = least.index(max(least))
            raise ValueError(
                f"prompts[{i}] with {len(prompts[i])} tokens and {limits[i]} new ones needs {least[i] * page_bytes / 2**30:.3g} GiB "
                f"of keys and values, expected at most {budget * page_bytes / 2**30:.3g} GiB (kv_memory)"
            )
        if self._cache is None or self._cache.pages < pages:
            self._cache = self._graphs = None  # their memory is free before the new one takes some
            self._cache = PagedCache(shapes, pages, self.model.device)
        cache = self._cache
        if not self.keep_cache:
            self._cache = None
        return cache

    def _look(self) -> ObservingContext:
        """What each layer keeps of a token and how it attends, seen in a forward of one token and remembered while type and device stay."""
        key = (self.model.dtype, self.model.device)
        if key not in self._seen:
            context = ObservingContext([0, 1], self.model.device)
            zero = torch.zeros(1, dtype=torch.int64, device=self.model.device)
            run_trunk(self.model, zero, zero, context)
            self._seen, self._agrees = {key: context}, None
        return self._seen[key]

    def _parts(self) -> LlamaParts | None:
        try:
            return LlamaParts(self.model)
        except UnlikeLlama:
            return None

    def _make_decoder(
        self, parts: LlamaParts | None, cache: PagedCache, switch: DecodeSwitch, *, rows: int, positions: int
    ) -> Decoder:
        """On a GPU graphs of its steps: those at hand while they fit, which they do as long as the cache is kept."""
        blocks, parameters = pages_for(positions), list(self.model.parameters())
        if self._graphs is not None and self._graphs.serves(parameters, cache, rows=rows, blocks=blocks):
            return self._graphs
        if parts is not None and self._agrees is None:
            self._agrees = parts_agree(parts, self.model, switch, self._look())
        decoder = ModuleDecoder(self.model, cache, switch)
        if parts is not None and self._agrees:
            decoder = parts_decoder(parts, decoder, cache, self._look(), rows=rows, positions=blocks * PAGE_SIZE)
        if self.model.device.type != "cuda":
            return decoder
        graphs = GraphDecoder(decoder, parameters, cache, rows=rows, blocks=blocks, device=self.model.device)
        self._graphs = graphs if self.keep_cache else None
        return graphs
