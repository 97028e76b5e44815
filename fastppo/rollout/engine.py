"""Sampling with a key-value cache on the very model that trains: its parameters are read where they lie, at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# As a module: fastppo.models imports this package for its attention, and may be only half loaded here.
from fastppo import models
from fastppo.ops import SampledTokens, sample_tokens, token_logprobs
from fastppo.rollout.attention import DecodeContext, KVCache, PrefillContext
from fastppo.rollout.rollout import FinishReason, Rollout
from fastppo.rollout.sampling import SamplingParams
from fastppo.rollout.stopping import StopStrings

PREFILL_TOKENS = 8192
"""Most prompt tokens in one forward; a longer prompt makes a forward of its own."""

FIRST_CAPACITY = 64
"""Room for completions in a new cache; it doubles when a sequence outgrows it."""

RUNNING = -1

Progress = Callable[[int, int], None]


class Engine:
    """Samples completions of many prompts side by side.

    Each prompt is run once for all its samples. Up to `max_batch_size` sequences decode together, and a finished one makes room for the
    next. All state of a call lives in the call: an exception or Ctrl-C in the middle leaves the engine as it was.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *, max_batch_size: int = 64
    ) -> None:
        """model: any causal LM that `prepare_model` accepts (it is called here); its weights are shared, never copied.

        tokenizer: needed for prompts given as text and for stop strings only.
        """
        if isinstance(max_batch_size, bool) or not isinstance(max_batch_size, int) or max_batch_size < 1:
            raise ValueError(f"max_batch_size is {max_batch_size!r}, expected an integer >= 1")
        self.model = models.prepare_model(model)
        self.tokenizer = tokenizer
        self.max_batch_size = max_batch_size

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]] | Sequence[str],
        sampling: SamplingParams,
        *,
        progress: Progress | None = None,
    ) -> Rollout:
        """`sampling.n` completions of every prompt: all of the first prompt, then all of the second, ...

        Args:
            prompts: lists of token ids, or texts (encoded by the tokenizer with its special tokens).
            progress: called with (finished sequences, all sequences) whenever some finish.

        Returns:
            A Rollout on the model's device with sampling log-probabilities. Up to rounding, a completion depends only on the weights,
            its prompt, the seed and its number (prompt number * n + sample).

        Raises:
            TypeError, ValueError: no prompt, an empty prompt or one that leaves no room in the model's context, an id outside the
            vocabulary, text or stop strings without a tokenizer.
        """
        models.require_prepared(self.model)
        if sampling.stop_strings and self.tokenizer is None:
            raise ValueError("sampling.stop_strings needs a tokenizer: Engine(model, tokenizer)")
        token_lists = self._encode(prompts)
        self._check_stop_ids(sampling)
        with models.evaluating(self.model):
            return _Generation(self, token_lists, sampling, progress).run()

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

    def _check_stop_ids(self, sampling: SamplingParams) -> None:
        for i, token in enumerate(sampling.stop_token_ids):
            if token >= self._vocab_size():
                raise ValueError(
                    f"stop_token_ids[{i}] is {token}, expected less than the vocabulary size {self._vocab_size()}"
                )

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
        limit, vocab_size = models.context_length(self.model), self.model.get_input_embeddings().weight.shape[0]
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


@dataclass
class _Row:
    """A sequence that is being decoded, as the host knows it."""

    sequence: int
    prompt_length: int
    generated: int = 0
    tokens: list[int] = field(default_factory=list)  # kept only where there are stop strings


class _Completion(NamedTuple):
    tokens: Tensor  # int64 [new]
    logprobs: Tensor  # fp32 [new]
    processed_logprobs: Tensor  # fp32 [new]
    reason: FinishReason


class _Prefilled(NamedTuple):
    """Prompts that have been run, and the sequences still to be started from them."""

    first_prompt: int
    starts: list[int]  # of each prompt in the packed keys and values
    logits: Tensor  # fp32 [prompts, V] after each prompt's last token
    layers: dict[int, tuple[Tensor, Tensor]]  # [Hkv, T, D]
    sequences: range


class _Generation:
    """One `generate` call.

    Sequences that are being decoded fill rows 0..A-1 of the cache and of every state tensor; when one ends, the last row moves into its
    place. `length` counts a row's tokens so far: the last of them is not in the cache yet, and the next is drawn for position `length`.
    """

    def __init__(
        self, engine: Engine, prompts: list[list[int]], sampling: SamplingParams, progress: Progress | None
    ) -> None:
        self.model, self.prompts, self.sampling, self.progress = engine.model, prompts, sampling, progress
        self.head = models.lm_head(engine.model)
        self.device = self.head.weight.device
        context = models.context_length(engine.model)
        self.limits = [min(sampling.max_new_tokens, (context or 2**62) - len(prompt)) for prompt in prompts]
        self.total = len(prompts) * sampling.n
        self.slots = min(engine.max_batch_size, self.total)
        self.cache = KVCache(self.slots, max(len(p) + n for p, n in zip(prompts, self.limits, strict=True)))
        self.stop_ids = torch.tensor(engine._stop_ids(sampling), dtype=torch.int64, device=self.device)
        self.stop_strings = StopStrings(engine.tokenizer, sampling.stop_strings) if sampling.stop_strings else None
        self.rows: list[_Row] = []
        self.prefilled: _Prefilled | None = None
        self.started = 0  # sequences
        self.done: dict[int, _Completion] = {}
        self.state = self._empty_state()

    def _empty_state(self) -> dict[str, Tensor]:
        """One entry or line for each slot."""
        longest = max(self.limits)
        integers = {name: torch.int64 for name in ("sequence", "length", "count", "limit", "last")}
        state = {name: torch.zeros(self.slots, dtype=dtype, device=self.device) for name, dtype in integers.items()}
        buffers = {"tokens": torch.int64, "logprobs": torch.float32, "processed_logprobs": torch.float32}
        state |= {k: torch.zeros(self.slots, longest, dtype=dtype, device=self.device) for k, dtype in buffers.items()}
        return state

    def run(self) -> Rollout:
        while len(self.done) < self.total:
            if self._should_admit():
                self._admit()
            else:
                self._decode()
        return self._pack()

    def _should_admit(self) -> bool:
        """Prefill is worth a forward of its own when some slots are free, not for each one."""
        free, waiting = self.slots - len(self.rows), self.total - self.started
        return waiting > 0 and free >= min(waiting, max(1, self.slots // 8))

    def _admit(self) -> None:
        """Start the next sequences in the free rows."""
        if self.prefilled is None:
            self.prefilled = self._prefill()
        first_row, free = len(self.rows), self.slots - len(self.rows)
        chosen, rest = self.prefilled.sequences[:free], self.prefilled.sequences[free:]
        prompts = [sequence // self.sampling.n for sequence in chosen]
        self.rows += [_Row(s, len(self.prompts[p])) for s, p in zip(chosen, prompts, strict=True)]
        self.started += len(chosen)
        self._fill_rows(first_row, prompts)
        among = self._tensor([p - self.prefilled.first_prompt for p in prompts])
        logits = self.prefilled.logits[among]
        self.prefilled = self.prefilled._replace(sequences=rest) if rest else None
        self._draw(first_row, logits)

    def _prefill(self) -> _Prefilled:
        """Run the next prompts, packed: as many as all their samples find a row, at least one."""
        n, first = self.sampling.n, self.started // self.sampling.n
        starts, end = [0], first
        while end < len(self.prompts) and (end == first or (end + 1 - first) * n <= self.slots - len(self.rows)):
            if end > first and starts[-1] + len(self.prompts[end]) > PREFILL_TOKENS:
                break
            starts.append(starts[-1] + len(self.prompts[end]))
            end += 1
        tokens = self._tensor([token for prompt in self.prompts[first:end] for token in prompt])
        positions = self._tensor([i for prompt in self.prompts[first:end] for i in range(len(prompt))])
        context = PrefillContext(starts, self.device)
        hidden = models.run_trunk(self.model, tokens, positions, context)
        logits = self.head.logits(hidden[self._tensor(starts[1:]) - 1])
        return _Prefilled(first, starts, logits, context.layers, range(first * n, end * n))

    def _fill_rows(self, first_row: int, prompts: list[int]) -> None:
        """Copy prompts' keys and values to rows first_row, first_row + 1, ... and set those rows' state."""
        lengths = [len(self.prompts[p]) for p in prompts]
        rows = torch.arange(first_row, len(self.rows), device=self.device)
        self.cache.reserve(min(self.cache.limit, max(lengths) + FIRST_CAPACITY))
        offsets = [self.prefilled.starts[p - self.prefilled.first_prompt] for p in prompts]
        source = self._tensor([o + i for o, length in zip(offsets, lengths, strict=True) for i in range(length)])
        target = self._tensor([i for length in lengths for i in range(length)])
        slots = rows.repeat_interleave(self._tensor(lengths), output_size=len(target))
        for layer, (k, v) in self.prefilled.layers.items():
            self.cache.write(layer, slots, target, k[:, source], v[:, source])
        values = {
            "sequence": [row.sequence for row in self.rows[first_row:]],
            "length": lengths,
            "count": [0] * len(prompts),
            "limit": [self.limits[p] for p in prompts],
        }
        for name, value in values.items():
            self.state[name][rows] = self._tensor(value)

    def _decode(self) -> None:
        """One more token for every row."""
        active = len(self.rows)
        lengths = self.state["length"][:active]
        longest = max(row.prompt_length + row.generated for row in self.rows)
        self.cache.reserve(longest)
        context = DecodeContext(self.cache, lengths, longest)
        hidden = models.run_trunk(self.model, self.state["last"][:active], lengths - 1, context)
        self._draw(0, self.head.logits(hidden))

    def _draw(self, first_row: int, logits: Tensor) -> None:
        """Sample for rows first_row.. from fp32 [rows, V], note the tokens and retire what has finished."""
        state = {name: tensor[first_row : len(self.rows)] for name, tensor in self.state.items()}
        drawn = self._sample(first_row, logits, state)
        at = (torch.arange(len(logits), device=self.device), state["count"])
        for name in ("tokens", "logprobs", "processed_logprobs"):
            state[name][at] = getattr(drawn, name).to(state[name].dtype)  # a model in fp64 gives fp64
        state["last"].copy_(drawn.tokens)
        state["count"] += 1
        state["length"] += 1
        for row in self.rows[first_row:]:
            row.generated += 1
        self._retire(first_row, self._outcomes(first_row, drawn.tokens, state))

    def _sample(self, first_row: int, logits: Tensor, state: dict[str, Tensor]) -> SampledTokens:
        params, floor = self.sampling, self.sampling.min_new_tokens
        options = dict(temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p)
        streams = dict(seed=params.seed, sequence_ids=state["sequence"], positions=state["length"])
        if not len(self.stop_ids) or all(row.generated >= floor for row in self.rows[first_row:]):
            return sample_tokens(logits, **options, **streams)
        early = state["count"] < floor
        banned = logits.clone()
        banned[:, self.stop_ids] = banned[:, self.stop_ids].masked_fill(early[:, None], -torch.inf)
        drawn = sample_tokens(banned, **options, **streams)
        raw = token_logprobs(logits, drawn.tokens, temperature=params.temperature or 1.0, ignore_index=-1)
        return drawn._replace(logprobs=torch.where(early, raw, drawn.logprobs))

    def _outcomes(self, first_row: int, tokens: Tensor, state: dict[str, Tensor]) -> list[int]:
        """FinishReason or RUNNING for each row: the one place where the host waits for the device."""
        code = torch.where(state["count"] >= state["limit"], int(FinishReason.LENGTH), RUNNING)
        code = torch.where(torch.isin(tokens, self.stop_ids), int(FinishReason.STOP), code)
        code = torch.where(tokens < 0, int(FinishReason.ERROR), code)
        if self.stop_strings is None:
            return code.tolist()
        codes, new = torch.stack([code, tokens]).tolist()
        for i, row in enumerate(self.rows[first_row:]):
            row.tokens.append(new[i])
            may_stop = codes[i] in (RUNNING, FinishReason.LENGTH) and row.generated >= self.sampling.min_new_tokens
            if may_stop and self.stop_strings.completed_by_last(row.tokens):
                codes[i] = int(FinishReason.STOP)
        return codes

    def _retire(self, first_row: int, outcomes: list[int]) -> None:
        """Take finished rows out, then move rows from the end into the gaps."""
        finished = [first_row + i for i, outcome in enumerate(outcomes) if outcome != RUNNING]
        if not finished:
            return
        for place in finished:
            self._complete(place, FinishReason(outcomes[place - first_row]))
        left = len(self.rows) - len(finished)
        gaps = [place for place in finished if place < left]
        movers = sorted(set(range(left, len(self.rows))) - set(finished))
        if gaps:
            source, target = self._tensor(movers), self._tensor(gaps)
            self.cache.move(
                source, target, max(self.rows[i].prompt_length + self.rows[i].generated for i in movers) - 1
            )
            for tensor in self.state.values():
                tensor[target] = tensor[source]
        for gap, mover in zip(gaps, movers, strict=True):
            self.rows[gap] = self.rows[mover]
        del self.rows[left:]
        if self.progress is not None:
            self.progress(len(self.done), self.total)

    def _complete(self, place: int, reason: FinishReason) -> None:
        row = self.rows[place]
        if reason is FinishReason.ERROR:
            self.cache.clear(self._tensor([place]))
        kept = row.generated - (reason is FinishReason.ERROR)
        found = (self.state[name][place, :kept].clone() for name in ("tokens", "logprobs", "processed_logprobs"))
        self.done[row.sequence] = _Completion(*found, reason)

    def _pack(self) -> Rollout:
        completions = [self.done[sequence] for sequence in range(self.total)]
        prompts = [self.prompts[sequence // self.sampling.n] for sequence in range(self.total)]
        prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
        new_lengths = torch.tensor([len(completion.tokens) for completion in completions])
        lengths = prompt_lengths + new_lengths
        bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        total = int(bounds[-1])
        position_ids = torch.arange(total) - bounds[:-1].repeat_interleave(lengths)
        action_mask = (position_ids >= prompt_lengths.repeat_interleave(lengths)).to(self.device)
        tokens = torch.zeros(total, dtype=torch.int64, device=self.device)
        tokens[~action_mask] = self._tensor([token for prompt in prompts for token in prompt])
        tokens[action_mask] = torch.cat([completion.tokens for completion in completions])
        logprobs, processed = tokens.new_zeros(2, total, dtype=torch.float32)
        logprobs[action_mask] = torch.cat([completion.logprobs for completion in completions])
        processed[action_mask] = torch.cat([completion.processed_logprobs for completion in completions])
        return Rollout(
            tokens=tokens,
            cu_seqlens=bounds.int().to(self.device),
            position_ids=position_ids.to(self.device),
            action_mask=action_mask,
            logprobs=logprobs,
            processed_logprobs=processed,
            finish_reasons=torch.tensor([c.reason for c in completions], dtype=torch.int8, device=self.device),
            prompt_index=torch.arange(len(self.prompts), device=self.device).repeat_interleave(self.sampling.n),
            temperature=float(self.sampling.temperature),
        )

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)
