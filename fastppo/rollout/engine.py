"""Sampling with a key-value cache on the very model that trains: its parameters are read where they lie, at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastppo.model.divided import team_of
from fastppo.model.packed import context_length, require_prepared
from fastppo.model.prepare import prepare_model
from fastppo.ops import _checks
from fastppo.rollout.decoder import Decoder
from fastppo.rollout.generation import Generation, OnTokens, ValueHead
from fastppo.rollout.model_runner import ModelRunner
from fastppo.rollout.pages import PagedCache, pages_for
from fastppo.rollout.prompts import encode_prompts, prompt_numbers
from fastppo.rollout.rollout import Rollout
from fastppo.rollout.sampling import SamplingParams
from fastppo.rollout.sequences import Manner
from fastppo.rollout.session import Session
from fastppo.rollout.stats import GenerationStats
from fastppo.rollout.stopping import StopStrings, stop_ids

Progress = Callable[[int, int], None]


class Engine:
    """Samples completions of many prompts side by side.

    Each prompt is run once for all its samples, which share its pages of the key-value cache. Up to `max_batch_size` sequences decode
    together, and a finished one makes room for the next. All state of a call lives in the call: an exception or Ctrl-C in the middle
    leaves the engine as it was.

    `generate` samples single answers; `open` begins a session of conversations and branches. `stats` tells what the last call did.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_batch_size: int = 64,
        kv_memory: float | Literal["auto"] = "auto",
        keep_cache: bool | float = False,
    ) -> None:
        """Takes a model to sample from.

        Args:
            model: any causal LM that `prepare_model` accepts (it is called here); its weights are shared, never copied. Of one that ranks run
                together (Transformers' `tp_plan`) every rank has an engine, and calls `generate` with the same arguments.
            tokenizer: needed for prompts given as text and for stop strings; what it and its chat template end a text with ends completions.
            max_batch_size: most sequences side by side.
            kv_memory: most GiB for keys and values; "auto" takes from what is free (a GPU's memory: 80 %, a CPU's: half, within the limit of
                a container). Sequences that do not fit wait; none is thrown out.
            keep_cache: keep the cache's memory, and on a GPU the CUDA graphs of the decode steps, between calls instead of giving it
                back after each. A number from 0 to 1: only where that cache takes at most this share of the device's memory.
        """
        if isinstance(max_batch_size, bool) or not isinstance(max_batch_size, int) or max_batch_size < 1:
            raise ValueError(f"max_batch_size is {max_batch_size!r}, expected an integer >= 1")
        if kv_memory != "auto":
            _checks.number("kv_memory", kv_memory, above=0)
        if not isinstance(keep_cache, bool):
            _checks.number("keep_cache", keep_cache, at_least=0, at_most=1)
        self.model = prepare_model(model)
        self.tokenizer = tokenizer
        self.max_batch_size = max_batch_size
        self.runner = ModelRunner(self.model, kv_memory, keep_cache)
        self.stats = GenerationStats()

    def generate(
        self,
        prompts: Sequence[Sequence[int]] | Sequence[str] | Mapping[str, Any],
        sampling: SamplingParams,
        *,
        progress: Progress | None = None,
        on_tokens: OnTokens | None = None,
        value_head: ValueHead | None = None,
        numbers: Sequence[int] | None = None,
    ) -> Rollout:
        """`sampling.n` completions of every prompt: all of the first prompt, then all of the second, ...

        Args:
            prompts: texts (encoded by the tokenizer with its special tokens, but for an end of sequence), lists of token ids, a tensor or array
                without padding, or a tokenizer's output with its `attention_mask`: see `encode_prompts`.
            progress: called with (finished sequences, all sequences) whenever some finish.
            on_tokens: called after every step with its [(sequence number, new token), ...].
            value_head: hidden [rows, H] -> values fp32 [rows]; the rollout then has the value of the state before each action.
            numbers: which prompts of a larger call these are, whose others are sampled elsewhere: their completions, and `prompt_index`, are what
                they would be there. By default 0, 1, ...

        Returns:
            A Rollout on the model's device with sampling log-probabilities. Up to rounding, a completion depends only on the weights,
            its prompt, the seed and its number (prompt number * n + sample); of a Llama-like fp32 model on a CPU, to the last bit.

        Raises:
            TypeError, ValueError: no prompt, an empty or padded prompt or one that leaves no room in the model's context, an id outside the
            vocabulary, text or stop strings without a tokenizer, a sequence that alone needs more than `kv_memory`.
            RuntimeError: called from a callback of a call on the same model. Other threads wait for each other, whatever engine they use.
        """
        self._check(sampling)
        token_lists = encode_prompts(prompts, self.model, self.tokenizer)
        numbers = prompt_numbers(numbers, len(token_lists))
        context, total = context_length(self.model) or 2**62, len(token_lists) * sampling.n
        lengths = [min(len(tokens) + sampling.max_new_tokens, context) for tokens in token_lists]
        slots, most = min(self.max_batch_size, total), max(map(pages_for, lengths))
        options = dict(
            slots=slots, max_length=max(lengths), many_turns=False, on_tokens=on_tokens, value_head=value_head
        )
        with self.runner.alone(), self.runner.lend(slots, max(lengths), pages=(slots + 1) * most + 1) as lent:
            generation = self._generation(*lent, sampling, **options)
            for i, (tokens, number) in enumerate(zip(token_lists, numbers, strict=True)):
                streams = [number * sampling.n + sample for sample in range(sampling.n)]
                generation.add(tokens, sampling.n, f"prompts[{i}]", streams, number)
            done = 0
            while generation.busy:
                ended = generation.advance()
                done += len(ended)
                if ended and progress is not None:
                    progress(done, total)
            return generation.pack()

    def open(
        self,
        sampling: SamplingParams,
        *,
        max_length: int | None = None,
        on_tokens: OnTokens | None = None,
        value_head: ValueHead | None = None,
    ) -> Session:
        """A session of many turns, for `with engine.open(sampling) as session`.

        Args:
            sampling: `max_new_tokens`, `min_new_tokens` and what ends a completion hold for each turn.
            max_length: most tokens of a sequence: prompt, turns and what is given between them. By default the model's context.
            on_tokens, value_head: as `generate` takes them.

        Raises:
            ValueError: stop strings without a tokenizer; a `max_length` beyond the model's context, or none where that has no limit; a model that
            several ranks run together.
        """
        if team_of(self.model) is not None:
            raise ValueError("the model is run by several ranks together, expected one alone: they can `generate`")
        self._check(sampling)
        context = context_length(self.model)
        longest = context if max_length is None else max_length
        if longest is None:
            raise ValueError("max_length is None, expected a number of tokens: the model's context has no limit")
        longest = _checks.integer_number("max_length", longest, at_least=2, at_most=context or 2**31 - 1)
        slots, lending = self.max_batch_size, ExitStack()
        pages = 2 * slots * pages_for(longest)  # as many sequences between two turns as in one
        with self.runner.alone(), lending:
            lent = lending.enter_context(self.runner.lend(slots, longest, pages=pages))
            options = dict(slots=slots, max_length=longest, many_turns=True, on_tokens=on_tokens, value_head=value_head)
            generation = self._generation(*lent, sampling, **options)
            return Session(generation, self.runner, self._encode_one, self._manner, lending.pop_all())

    def _encode_one(self, prompt: Sequence[int] | str) -> list[int]:
        return encode_prompts([prompt], self.model, self.tokenizer)[0]

    def _generation(self, cache: PagedCache, decoder: Decoder, sampling: SamplingParams, **options: Any) -> Generation:
        stops = sorted(stop_ids(self.model, self.tokenizer, sampling))
        generation = Generation(self.model, cache, decoder, self._manner(sampling), stop_ids=stops, **options)
        self.stats = generation.stats
        return generation

    def _manner(self, sampling: SamplingParams) -> Manner:
        """Raises ValueError for stop strings without a tokenizer."""
        strings = sampling.stop_strings
        if strings and self.tokenizer is None:
            raise ValueError("sampling.stop_strings needs a tokenizer: Engine(model, tokenizer)")
        return Manner(sampling, StopStrings(self.tokenizer, strings) if strings else None)

    def _check(self, sampling: SamplingParams) -> None:
        """Whether the model can be sampled from in this way."""
        require_prepared(self.model)
        self._manner(sampling)
