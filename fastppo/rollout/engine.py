"""Sampling with a key-value cache on the very model that trains: its parameters are read where they lie, at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from numbers import Integral
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastppo.model.packed import context_length, require_prepared
from fastppo.model.prepare import prepare_model
from fastppo.ops import _checks
from fastppo.rollout.decoder import Decoder
from fastppo.rollout.generation import Generation, OnTokens
from fastppo.rollout.model_runner import ModelRunner
from fastppo.rollout.pages import PagedCache, pages_for
from fastppo.rollout.rollout import Rollout
from fastppo.rollout.sampling import SamplingParams
from fastppo.rollout.session import Session
from fastppo.rollout.stats import GenerationStats
from fastppo.rollout.stopping import StopStrings

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
        keep_cache: bool = False,
    ) -> None:
        """Takes a model to sample from.

        Args:
            model: any causal LM that `prepare_model` accepts (it is called here); its weights are shared, never copied.
            tokenizer: needed for prompts given as text and for stop strings only.
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
        self.runner = ModelRunner(self.model, kv_memory, keep_cache)
        self.stats = GenerationStats()

    def generate(
        self,
        prompts: Sequence[Sequence[int]] | Sequence[str],
        sampling: SamplingParams,
        *,
        progress: Progress | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Rollout:
        """`sampling.n` completions of every prompt: all of the first prompt, then all of the second, ...

        Args:
            prompts: lists of token ids, or texts (encoded by the tokenizer with its special tokens).
            progress: called with (finished sequences, all sequences) whenever some finish.
            on_tokens: called after every step with its [(sequence number, new token), ...].

        Returns:
            A Rollout on the model's device with sampling log-probabilities. Up to rounding, a completion depends only on the weights,
            its prompt, the seed and its number (prompt number * n + sample); of a Llama-like fp32 model on a CPU, to the last bit.

        Raises:
            TypeError, ValueError: no prompt, an empty prompt or one that leaves no room in the model's context, an id outside the
            vocabulary, text or stop strings without a tokenizer, a sequence that alone needs more than `kv_memory`.
            RuntimeError: called from a callback of a call on the same model. Other threads wait for each other, whatever engine they use.
        """
        self._check(sampling)
        token_lists = self._encode(prompts)
        context, total = context_length(self.model) or 2**62, len(token_lists) * sampling.n
        lengths = [min(len(tokens) + sampling.max_new_tokens, context) for tokens in token_lists]
        slots, most = min(self.max_batch_size, total), max(map(pages_for, lengths))
        options = dict(slots=slots, max_length=max(lengths), many_turns=False, on_tokens=on_tokens)
        with self.runner.alone(), self.runner.lend(slots, max(lengths), pages=(slots + 1) * most + 1) as lent:
            generation = self._generation(*lent, sampling, **options)
            for i, tokens in enumerate(token_lists):
                generation.add(tokens, sampling.n, f"prompts[{i}]")
            done = 0
            while generation.busy:
                ended = generation.advance()
                done += len(ended)
                if ended and progress is not None:
                    progress(done, total)
            return generation.pack()

    def open(self, sampling: SamplingParams, *, max_length: int | None = None) -> Session:
        """A session of many turns, for `with engine.open(sampling) as session`.

        Args:
            sampling: `max_new_tokens`, `min_new_tokens` and what ends a completion hold for each turn.
            max_length: most tokens of a sequence: prompt, turns and what is given between them. By default the model's context.

        Raises:
            ValueError: stop strings without a tokenizer; a `max_length` beyond the model's context, or none where that has no limit.
        """
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
            generation = self._generation(*lent, sampling, slots=slots, max_length=longest, many_turns=True)
            return Session(generation, self.runner, lambda prompt: self._encode([prompt])[0], lending.pop_all())

    def _generation(self, cache: PagedCache, decoder: Decoder, sampling: SamplingParams, **options: Any) -> Generation:
        strings = StopStrings(self.tokenizer, sampling.stop_strings) if sampling.stop_strings else None
        stops = dict(stop_ids=self._stop_ids(sampling), stop_strings=strings)
        generation = Generation(self.model, cache, decoder, sampling, **stops, **options)
        self.stats = generation.stats
        return generation

    def _check(self, sampling: SamplingParams) -> None:
        """Whether the model can be sampled from in this way."""
        require_prepared(self.model)
        if sampling.stop_strings and self.tokenizer is None:
            raise ValueError("sampling.stop_strings needs a tokenizer: Engine(model, tokenizer)")
        for i, token in enumerate(sampling.stop_token_ids):
            if token >= self._vocab_size():
                raise ValueError(
                    f"stop_token_ids[{i}] is {token}, expected less than the vocabulary size {self._vocab_size()}"
                )

    def _stop_ids(self, sampling: SamplingParams) -> list[int]:
        """Token ids that end a completion, ascending."""
        return sorted({*sampling.stop_token_ids, *(() if sampling.ignore_eos else self._eos_ids())})

    def _eos_ids(self) -> list[int]:
        """The model's end-of-sequence ids; ids outside its vocabulary (left in many small configurations) can never be drawn."""
        eos = getattr(self.model.generation_config, "eos_token_id", None)
        if eos is None:
            eos = getattr(self.model.config.get_text_config(), "eos_token_id", None)
        ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        return [i for i in ids if 0 <= i < self._vocab_size()]

    def _vocab_size(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]

    def _encode(self, prompts: Sequence[Sequence[int]] | Sequence[str]) -> list[list[int]]:
        if isinstance(prompts, str):
            raise TypeError("prompts is a single string, expected a list of prompts")
        if not len(prompts):
            raise ValueError("prompts is empty, expected at least one prompt")
        return [self._check_prompt(i, self._encode_one(i, prompt)) for i, prompt in enumerate(prompts)]

    def _encode_one(self, index: int, prompt: Sequence[int] | str) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"prompts[{index}] is text, which needs a tokenizer: Engine(model, tokenizer)")
            return self.tokenizer.encode(prompt)
        return prompt.tolist() if isinstance(prompt, Tensor) else list(prompt)

    def _check_prompt(self, index: int, tokens: list[int]) -> list[int]:
        limit, vocab_size = context_length(self.model), self.model.get_input_embeddings().weight.shape[0]
        if not tokens:
            raise ValueError(f"prompts[{index}] is empty, expected at least one token")
        if limit is not None and len(tokens) >= limit:
            raise ValueError(
                f"prompts[{index}] has {len(tokens)} tokens, expected at most {limit - 1}: "
                f"the model's context is {limit} and must hold one new token"
            )
        if odd := [token for token in tokens if not isinstance(token, Integral)]:
            raise TypeError(f"prompts[{index}] holds {odd[0]!r}, expected token ids (integers)")
        if min(tokens) < 0 or max(tokens) >= vocab_size:
            raise ValueError(
                f"prompts[{index}] has token ids from {min(tokens)} to {max(tokens)}, expected 0 to {vocab_size - 1}"
            )
        return [int(token) for token in tokens]
