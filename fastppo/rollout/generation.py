"""One call of `Engine.generate`: admission, prefill, decoding step by step, and the packed result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastppo.model.packed import context_length, lm_head
from fastppo.ops import SampledTokens, sample_tokens, token_logprobs
from fastppo.rollout.decoder import PREFILL_TOKENS, Decoder
from fastppo.rollout.pages import PAGE_SIZE, PagedCache, PagePool, pages_for
from fastppo.rollout.record import on_device
from fastppo.rollout.rollout import FinishReason, Rollout
from fastppo.rollout.sampling import SamplingParams
from fastppo.rollout.stopping import StopStrings

DRAWS_AHEAD = {"cuda": 1}
"""By device type (0 for others), how many draws of decode steps are on their way when the host looks at one. A GPU so always has a step to run while
the host learns which sequences ended in the step before; those that a stop token ends run one more step, whose token is left out."""

Progress = Callable[[int, int], None]
OnTokens = Callable[[list[tuple[int, int]]], None]


@dataclass
class GenerationStats:
    """What a `generate` call did; tokens, seconds, bytes."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    shared_prompt_tokens: int = 0
    """Prompt tokens that a sample did not have to run, because another sample of its prompt had."""
    new_tokens: int = 0
    """Those of prefill, one a sequence, and those of decoding."""
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    decode_bytes: int = 0
    """Weights once a step, and the keys and values that the step's sequences see."""
    slots: int = 0
    """Most sequences side by side."""
    pages: int = 0
    peak_pages: int = 0

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prefill_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_tokens_per_second(self) -> float:
        return self.decode_tokens / max(self.decode_seconds, 1e-9)

    @property
    def occupancy(self) -> float:
        """Mean share of the slots that held a sequence, over the decode steps."""
        return self.decode_tokens / max(self.decode_steps * self.slots, 1)

    @property
    def tokens_per_second(self) -> float:
        """New tokens over all of the call's time so far, prefill included."""
        return self.new_tokens / max(self.prefill_seconds + self.decode_seconds, 1e-9)

    @property
    def shared_prompt_share(self) -> float:
        """Of the prompt tokens of all started sequences, those that were not run again."""
        return self.shared_prompt_tokens / max(self.shared_prompt_tokens + self.prefill_tokens, 1)

    @property
    def decode_bytes_per_second(self) -> float:
        """To be set against the memory bandwidth: that is what bounds decoding."""
        return self.decode_bytes / max(self.decode_seconds, 1e-9)


@dataclass
class _Prompt:
    tokens: list[int]
    limit: int  # new tokens
    pages: list[int] = field(default_factory=list)  # while samples are still to be started from it

    @property
    def full_pages(self) -> int:
        """Pages that all samples share."""
        return len(self.tokens) // PAGE_SIZE

    @property
    def partial_pages(self) -> int:
        """1 where the prompt ends inside a page: each sample goes on in a copy of it."""
        return int(len(self.tokens) % PAGE_SIZE > 0)

    @property
    def own_pages(self) -> int:
        """Pages of a sample's own. Its last token is drawn and never run."""
        return pages_for(len(self.tokens) + self.limit - 1) - self.full_pages


@dataclass
class _Row:
    """A sequence that is being decoded."""

    sequence: int
    length: int  # tokens so far: the last is not in the cache yet, and the next is drawn for this position
    left: int  # draws that it may still get
    pages: list[int]
    drawn: int = 0
    seen: int = 0  # of the draws, those that the host has looked at
    ended: bool = False
    tokens: list[int] = field(default_factory=list)  # those seen; kept only where there are stop strings


class _Draw(NamedTuple):
    """One new token for each of some rows."""

    rows: list[_Row]
    sampled: SampledTokens
    tokens: Tensor  # sampled.tokens on the host, once `arrived`
    arrived: torch.cuda.Event | None

    @classmethod
    def launched(cls, rows: list[_Row], sampled: SampledTokens) -> _Draw:
        if not sampled.tokens.is_cuda:
            return cls(rows, sampled, sampled.tokens, None)
        tokens, arrived = sampled.tokens.to("cpu", non_blocking=True), torch.cuda.Event()
        arrived.record()
        return cls(rows, sampled, tokens, arrived)

    def look(self) -> list[int]:
        """The tokens; waits for the device's draw, not for what was launched since."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tokens.tolist()


class _Prefilled(NamedTuple):
    """Prompts that have been run, and the sequences still to be started from them."""

    first_prompt: int
    logits: Tensor  # fp32 [prompts, V] after each prompt's last token
    sequences: range


class Generation:
    """One `generate` call.

    Sequences that are being decoded fill rows 0..A-1 of every state tensor; when one ends, the last row moves into its place. Keys
    and values stay where they are: a row's pages stand in its line of the block table. A sequence is started only when all pages
    that it may come to need are free, so none is ever thrown out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: PagedCache,
        decoder: Decoder,
        prompts: list[list[int]],
        sampling: SamplingParams,
        *,
        slots: int,
        stop_ids: list[int],
        stop_strings: StopStrings | None,
        progress: Progress | None,
        on_tokens: OnTokens | None,
    ) -> None:
        self.model, self.cache, self.decoder, self.sampling = model, cache, decoder, sampling
        self.stop_ids, self.stop_strings = frozenset(stop_ids), stop_strings
        self.progress, self.on_tokens = progress, on_tokens
        self.head = lm_head(model)
        self.device = self.head.weight.device
        self.prompts = [
            _Prompt(p, limit) for p, limit in zip(prompts, new_token_limits(model, prompts, sampling), strict=True)
        ]
        self.total, self.slots = len(prompts) * sampling.n, slots
        self.pool = PagePool(cache.pages)
        self.rows: list[_Row] = []
        self.prefilled: _Prefilled | None = None
        self.started = 0  # sequences
        self.reasons: dict[int, FinishReason] = {}
        self.draws: list[_Draw] = []
        self.looked_at = 0  # of the draws
        self.kept = [0] * self.total  # each sequence's tokens
        blocks = max(pages_for(len(p.tokens) + p.limit) for p in self.prompts)
        # Filled with page 0, which exists: what lies beyond a sequence's pages is never looked at.
        self.block_table = torch.zeros(slots, blocks, dtype=torch.int32, device=self.device)
        names = ("sequence", "length", "last")
        self.state = {name: torch.zeros(slots, dtype=torch.int64, device=self.device) for name in names}
        self.stats = GenerationStats(slots=slots, pages=cache.pages)
        self._weight_bytes = _bytes_read_a_step(model)
        self._token_bytes = cache.bytes_per_page // PAGE_SIZE

    def run(self) -> Rollout:
        while len(self.reasons) < self.total:
            start = perf_counter()
            if self._should_admit():
                self._admit()
                self.stats.prefill_seconds += perf_counter() - start
            else:
                if self.rows:
                    self._decode()
                else:
                    self._look(ahead=0)
                self.stats.decode_seconds += perf_counter() - start
            self.stats.peak_pages = max(self.stats.peak_pages, self.pool.pages - self.pool.available)
        return self._pack()

    # Admission

    def _should_admit(self) -> bool:
        """Prefill is worth a forward of its own when some slots are free, not for each one."""
        free, waiting = self.slots - len(self.rows), self.total - self.started
        if not waiting or (self.rows and free < min(waiting, max(1, self.slots // 8))):
            return False
        return self._startable() > 0

    def _startable(self) -> int:
        """How many of the next prompt's sequences have a slot and pages now."""
        prompt = self.prompts[self.started // self.sampling.n]
        left = self.sampling.n - self.started % self.sampling.n
        available = self.pool.available - (0 if prompt.pages else pages_for(len(prompt.tokens)))
        count = min(left, self.slots - len(self.rows))
        # The last sample takes over the prompt's own partial page.
        while count and count * prompt.own_pages - (prompt.partial_pages if count == left else 0) > available:
            count -= 1
        return count

    def _admit(self) -> None:
        """Start the next sequences in the free rows."""
        if self.prefilled is None:
            self.prefilled = self._prefill()
        first_row, first_prompt = len(self.rows), self.prefilled.first_prompt
        chosen = []
        while self.prefilled.sequences[len(chosen) :] and (count := self._startable()):
            chosen += self._start(count)
        rest = self.prefilled.sequences[len(chosen) :]
        logits = self.prefilled.logits[self._tensor([s // self.sampling.n - first_prompt for s in chosen])]
        self.prefilled = self.prefilled._replace(sequences=rest) if rest else None
        self._draw(first_row, logits, ahead=0)  # waits for the prompts: their time is not that of the steps after them

    def _start(self, count: int) -> list[int]:
        """Rows for the next `count` sequences, all of one prompt."""
        index = self.started // self.sampling.n
        prompt, sequences = self.prompts[index], list(range(self.started, self.started + count))
        first_row, length = len(self.rows), len(prompt.tokens)
        shared, partial = prompt.pages[: prompt.full_pages], prompt.pages[prompt.full_pages :]
        copies = []
        for sequence in sequences:
            if (sequence + 1) % self.sampling.n == 0:  # the last sample inherits what the prompt held
                own = partial + self.pool.take(prompt.own_pages - len(partial))
                prompt.pages = []
            else:
                own = self.pool.take(prompt.own_pages)
                self.pool.share(shared)
                copies += own[: len(partial)]
            self.rows.append(_Row(sequence, length, prompt.limit, shared + own))
        if copies:
            self.cache.copy(self._tensor(partial).expand(len(copies)), self._tensor(copies))
        self.started += count
        self.stats.shared_prompt_tokens += length * (count - (sequences[0] % self.sampling.n == 0))
        rows = slice(first_row, len(self.rows))
        self.state["sequence"][rows] = self._tensor(sequences)
        self.state["length"][rows] = length
        pages = self._tensor([row.pages for row in self.rows[rows]], torch.int32)
        self.block_table[rows, : pages.shape[1]] = pages
        return sequences

    # Prefill

    def _prefill(self) -> _Prefilled:
        """Run the next prompts, packed: as many as all their samples can start at once, at least one."""
        n, first = self.sampling.n, self.started // self.sampling.n
        end, tokens, pages, free = first, 0, self.pool.available, self.slots - len(self.rows)
        while end < len(self.prompts):
            prompt = self.prompts[end]
            tokens += len(prompt.tokens)
            pages -= prompt.full_pages + n * prompt.own_pages
            if end > first and (tokens > PREFILL_TOKENS or pages < 0 or (end + 1 - first) * n > free):
                break
            end += 1
        prompts = self.prompts[first:end]
        for prompt in prompts:
            prompt.pages = self.pool.take(pages_for(len(prompt.tokens)))
        self.stats.prefill_tokens += sum(len(prompt.tokens) for prompt in prompts)
        hidden = self.decoder.prefill([prompt.tokens for prompt in prompts], [prompt.pages for prompt in prompts])
        return _Prefilled(first, self.head.logits(hidden), range(first * n, end * n))

    # Decoding

    def _decode(self) -> None:
        """One more token for every row."""
        active = len(self.rows)
        last, lengths = self.state["last"][:active], self.state["length"][:active]
        hidden = self.decoder.step(last, lengths, self.block_table[:active])
        self.stats.decode_steps += 1
        self.stats.decode_bytes += self._weight_bytes + self._token_bytes * sum(row.length for row in self.rows)
        self._draw(0, self.head.logits(hidden), ahead=DRAWS_AHEAD.get(self.device.type, 0))

    def _draw(self, first_row: int, logits: Tensor, *, ahead: int) -> None:
        """Sample for rows first_row.. from fp32 [rows, V], look at what is due and retire what has finished."""
        rows = self.rows[first_row:]
        state = {name: tensor[first_row : len(self.rows)] for name, tensor in self.state.items()}
        sampled = self._sample(first_row, logits, state)
        torch.clamp(sampled.tokens, min=0, out=state["last"])  # a row in error may run for a step more
        state["length"] += 1
        for row in rows:
            row.drawn, row.length, row.left = row.drawn + 1, row.length + 1, row.left - 1
        self.draws.append(_Draw.launched(rows, sampled))
        self._look(ahead=ahead)
        self._retire()

    def _sample(self, first_row: int, logits: Tensor, state: dict[str, Tensor]) -> SampledTokens:
        params, floor = self.sampling, self.sampling.min_new_tokens
        options = dict(temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p)
        streams = dict(seed=params.seed, sequence_ids=state["sequence"], positions=state["length"])
        rows = self.rows[first_row:]
        if not self.stop_ids or all(row.drawn >= floor for row in rows):
            return sample_tokens(logits, **options, **streams)
        early = self._tensor([row.drawn < floor for row in rows], torch.bool)
        stops = self._tensor(sorted(self.stop_ids))
        banned = logits.clone()
        banned[:, stops] = banned[:, stops].masked_fill(early[:, None], -torch.inf)
        sampled = sample_tokens(banned, **options, **streams)
        raw = token_logprobs(logits, sampled.tokens, temperature=params.temperature or 1.0, ignore_index=-1)
        return sampled._replace(logprobs=torch.where(early, raw, sampled.logprobs))

    def _look(self, *, ahead: int) -> None:
        """Learn all drawn tokens but those of the last `ahead` draws, and which sequences they end."""
        finished = len(self.reasons)
        while self.looked_at < len(self.draws) - ahead:
            draw = self.draws[self.looked_at]
            self.looked_at += 1
            seen = [(row, token) for row, token in zip(draw.rows, draw.look(), strict=True) if not row.ended]
            for row, token in seen:
                row.seen += 1
                reason = self._reason(row, token)
                if reason is not None:
                    row.ended = True
                    self.reasons[row.sequence] = reason
                    self.kept[row.sequence] = row.seen - (reason == FinishReason.ERROR)
            self.stats.new_tokens += len(seen)
            self.stats.decode_tokens += sum(row.seen > 1 for row, _ in seen)  # the first comes from prefill
            if self.on_tokens is not None:
                self.on_tokens([(row.sequence, token) for row, token in seen if token >= 0])
        if self.progress is not None and len(self.reasons) > finished:
            self.progress(len(self.reasons), self.total)

    def _reason(self, row: _Row, token: int) -> FinishReason | None:
        """Why the row ends with this token; None while it goes on."""
        if token < 0:
            return FinishReason.ERROR
        if token in self.stop_ids:
            return FinishReason.STOP
        if self.stop_strings is not None:
            row.tokens.append(token)
            if row.seen >= self.sampling.min_new_tokens and self.stop_strings.completed_by_last(row.tokens):
                return FinishReason.STOP
        return FinishReason.LENGTH if row.left == 0 and row.seen == row.drawn else None

    def _retire(self) -> None:
        """Take rows out that have ended or have had their last draw, then move rows from the end into the gaps."""
        finished = {place for place, row in enumerate(self.rows) if row.ended or row.left == 0}
        if not finished:
            return
        for place in finished:
            self.pool.release(self.rows[place].pages)
        left = len(self.rows) - len(finished)
        gaps = [place for place in range(left) if place in finished]
        movers = [place for place in range(left, len(self.rows)) if place not in finished]
        if gaps:
            source, target = self._tensor(movers), self._tensor(gaps)
            for tensor in (*self.state.values(), self.block_table):
                tensor[target] = tensor[source]
        for gap, mover in zip(gaps, movers, strict=True):
            self.rows[gap] = self.rows[mover]
        del self.rows[left:]

    # Result

    def _pack(self) -> Rollout:
        """Every draw's tokens, brought into the order of sequences. An error's draw is left out, and one after a sequence's end."""
        owners = self._tensor([row.sequence for draw in self.draws for row in draw.rows])
        fields = [torch.cat(columns) for columns in zip(*(draw.sampled for draw in self.draws), strict=True)]
        sampled = SampledTokens(*fields)
        new_lengths, order = self._tensor(self.kept), owners.argsort(stable=True)
        draws = torch.bincount(owners, minlength=self.total)
        numbers = torch.arange(len(order), dtype=torch.int64, device=self.device) - (
            draws.cumsum(0) - draws
        ).repeat_interleave(draws)
        order = order[numbers < new_lengths.repeat_interleave(draws)]
        prompt_index = torch.arange(len(self.prompts), dtype=torch.int64, device=self.device).repeat_interleave(
            self.sampling.n
        )
        prompt_lengths = self._tensor([len(prompt.tokens) for prompt in self.prompts])[prompt_index]
        lengths = prompt_lengths + new_lengths
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        total = int(bounds[-1])
        position_ids = torch.arange(total, dtype=torch.int64, device=self.device) - bounds[:-1].repeat_interleave(
            lengths
        )
        action_mask = position_ids >= prompt_lengths.repeat_interleave(lengths)
        tokens = torch.zeros(total, dtype=torch.int64, device=self.device)
        tokens[~action_mask] = self._tensor([t for p in self.prompts for _ in range(self.sampling.n) for t in p.tokens])
        tokens[action_mask] = sampled.tokens[order]
        return Rollout(
            tokens=tokens,
            cu_seqlens=bounds.int(),
            position_ids=position_ids,
            action_mask=action_mask,
            logprobs=sampled.logprobs[order].float(),  # a model in fp64 gives fp64
            processed_logprobs=sampled.processed_logprobs[order].float(),
            finish_reasons=self._tensor([self.reasons[sequence] for sequence in range(self.total)], torch.int8),
            prompt_index=prompt_index,
            temperature=float(self.sampling.temperature),
        )

    def _tensor(self, values: list, dtype: torch.dtype = torch.int64) -> Tensor:
        return on_device(values, self.device, dtype)


def _bytes_read_a_step(model: PreTrainedModel) -> int:
    """All weights but an input embedding of its own, of which a step reads a few lines."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    read = (p for p in model.parameters() if p is not embedding or embedding is head)
    return sum(p.numel() * p.element_size() for p in read)


def new_token_limits(model: PreTrainedModel, prompts: list[list[int]], sampling: SamplingParams) -> list[int]:
    """How many tokens each prompt's completions may get: `max_new_tokens`, or what the model's context leaves."""
    context = context_length(model)
    return [min(sampling.max_new_tokens, (context or 2**62) - len(prompt)) for prompt in prompts]


def pages_needed(prompts: list[list[int]], limits: list[int], sampling: SamplingParams) -> list[int]:
    """For each prompt, the pages with which one of its samples can run while the others wait."""
    needed = []
    for tokens, limit in zip(prompts, limits, strict=True):
        prompt = _Prompt(tokens, limit)
        kept = prompt.partial_pages if sampling.n > 1 else 0  # later samples copy it
        needed.append(prompt.full_pages + prompt.own_pages + kept)
    return needed
