"""Continuous batching: turns that are decoded side by side, step by step, and how each ends."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import NamedTuple
from weakref import WeakMethod

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastppo.model.divided import local_part
from fastppo.model.host import on_device
from fastppo.model.packed import lm_head
from fastppo.ops import SampledTokens, sample_tokens, token_logprobs
from fastppo.rollout.admission import Admission, HeadOutputs
from fastppo.rollout.decoder import Decoder
from fastppo.rollout.pages import PAGE_SIZE, PagedCache, pages_for
from fastppo.rollout.rollout import FinishReason, Rollout
from fastppo.rollout.sampling import SamplingParams
from fastppo.rollout.sequences import Manner, Sequence, Turn, pack
from fastppo.rollout.stats import GenerationStats

DRAWS_AHEAD = {"cuda": 1}
"""By device type (0 for others), how many draws of decode steps are on their way when the host looks at one. A GPU so always has a step to run while
the host learns which sequences ended in the step before; those that a stop token ends run one more step, whose token is left out."""

DRAWING = ("temperature", "top_k", "top_p", "min_p")
"""Settings of `SamplingParams` that say how a token is drawn."""

OnTokens = Callable[[list[tuple[int, int]]], None]
ValueHead = Callable[[Tensor], Tensor]
"""hidden [rows, H] -> values fp32 [rows]"""


@dataclass
class _Row:
    """A sequence whose turn is being decoded."""

    sequence: Sequence
    length: int  # tokens so far: the last is not in the cache yet, and the next is drawn for this position
    left: int  # draws that it may still get
    drawn: int = 0
    seen: int = 0  # of the draws, those that the host has looked at
    ended: bool = False
    tokens: list[int] = field(default_factory=list)  # those seen
    draws: list[int] = field(default_factory=list)  # their places among all draws


class _Draw(NamedTuple):
    """One new token for each of some rows."""

    rows: list[_Row]
    first: int  # how many draws of rows came before
    sampled: SampledTokens
    values: Tensor | None  # fp32, of the states before the tokens
    tokens: Tensor  # sampled.tokens on the host, once `arrived`
    arrived: torch.cuda.Event | None

    @classmethod
    def launched(cls, rows: list[_Row], first: int, sampled: SampledTokens, values: Tensor | None) -> _Draw:
        if not sampled.tokens.is_cuda:
            return cls(rows, first, sampled, values, sampled.tokens, None)
        tokens, arrived = sampled.tokens.to("cpu", non_blocking=True), torch.cuda.Event()
        arrived.record()
        return cls(rows, first, sampled, values, tokens, arrived)

    def look(self) -> list[int]:
        """The tokens; waits for the device's draw, not for what was launched since."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tokens.tolist()


class Generation:
    """The sequences of one `generate` call or session.

    Those whose turn is being decoded fill rows 0..A-1 of every state tensor; when a turn ends, the last row moves into its place. Keys and
    values stay where they are: a row's pages stand in its line of the block table.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: PagedCache,
        decoder: Decoder,
        usual: Manner,
        *,
        slots: int,
        max_length: int,
        stop_ids: list[int],
        many_turns: bool,
        on_tokens: OnTokens | None = None,
        value_head: ValueHead | None = None,
    ) -> None:
        """usual: how turns are sampled that have no manner of their own. slots: most rows. max_length: most tokens of a sequence.
        many_turns: others may follow upon a first, so pages are kept. value_head: what is to be said of each state besides."""
        self.decoder, self.usual, self.max_length = decoder, usual, max_length
        self.drawn_by = {_drawing(usual.sampling)}  # every way in which tokens are drawn here
        self.many_turns, self.on_tokens = many_turns, on_tokens
        self.stop_ids = frozenset(stop_ids)
        self.head, self.value_head = lm_head(model), value_head
        self.device = self.head.weight.device
        self.slots = slots
        self.stats = GenerationStats(slots=slots, pages=cache.pages)
        # The admission does not hold the generation: without a cycle, cache and decoder are free as soon as nobody needs them.
        prefill = WeakMethod(self._prefill)
        self.admission = Admission(cache, lambda *work: prefill()(*work), self.device, self.stats)
        self.sequences: list[Sequence] = []
        self.prompts = 0
        self.rows: list[_Row] = []
        self.draws: list[_Draw] = []
        self.drawn = 0  # tokens in all draws
        self.looked_at = 0  # of the draws
        self.ended: list[Turn] = []  # of which nobody has been told
        # Filled with page 0, which exists: what lies beyond a sequence's pages is never looked at.
        self.block_table = torch.zeros(slots, pages_for(max_length), dtype=torch.int32, device=self.device)
        names = ("sequence", "length", "last")
        self.state = {name: torch.zeros(slots, dtype=torch.int64, device=self.device) for name in names}
        self._weight_bytes = _bytes_read_a_step(model)
        self._token_bytes = cache.bytes_per_page // PAGE_SIZE

    # What the caller asks for

    def add(
        self,
        tokens: list[int],
        n: int,
        name: str,
        streams: list[int] | None = None,
        prompt: int | None = None,
        manner: Manner | None = None,
    ) -> list[Sequence]:
        """n sequences that begin with the prompt `tokens`, called `name` in errors. Raises ValueError where the cache can never hold one of them.

        streams: [n] what their draws come from; by default their numbers. prompt: which prompt it is; by default how many came before.
        manner: how they are sampled; by default as usual.
        """
        first, manner = len(self.sequences), manner or self.usual
        limit = min(manner.sampling.max_new_tokens, self.max_length - len(tokens))
        streams = list(range(first, first + n)) if streams is None else streams
        number = self.prompts if prompt is None else prompt
        added = [Sequence(first + i, streams[i], number, list(tokens), manner, limit) for i in range(n)]
        self.admission.add(name, tokens, added)
        self.drawn_by.add(_drawing(manner.sampling))
        self.sequences += added
        self.prompts += 1
        return added

    def append(self, sequence: Sequence, tokens: list[int], most: int, manner: Manner) -> None:
        """Give tokens to a sequence whose turn has ended, and it the next turn, of at most so many. Raises as `add`."""
        whole = sequence.tokens + tokens
        longer = replace(sequence, tokens=whole, limit=min(self.max_length - len(whole), most))
        self.admission.require_room(f"sequence {sequence.id}", longer, longer.pages_for_turn)
        sequence.tokens, sequence.limit, sequence.finish_reason = whole, longer.limit, None
        sequence.manner, sequence.cut = manner, False
        self.drawn_by.add(_drawing(manner.sampling))
        self.admission.resume(sequence)

    def fork(self, sequence: Sequence, stream: int | None = None) -> Sequence:
        """A sequence of its own with the same past. stream: what its draws come from; by default its number."""
        past = dict(tokens=list(sequence.tokens), chosen=list(sequence.chosen), draws=list(sequence.draws))
        number = len(self.sequences)
        stream = number if stream is None else stream
        twin = replace(sequence, id=number, stream=stream, closed=False, **past)
        self.admission.share(sequence, twin)
        self.sequences.append(twin)
        return twin

    def close(self, sequence: Sequence, tokens: list[int]) -> None:
        """No turn will follow, only these tokens."""
        sequence.closed, sequence.tokens = True, sequence.tokens + tokens
        self.admission.forget(sequence)

    def cut(self, sequence: Sequence) -> None:
        """The turn under way ends with the next token."""
        sequence.cut = True
        for row in self.rows:
            if row.sequence is sequence:
                row.left = min(row.left, 1)

    def logprobs(self, sequence: Sequence) -> list[float]:
        """Of the tokens of its last turn, as `Rollout.logprobs` has them."""
        start, end = sequence.chosen[-1]
        places = sequence.draws[len(sequence.draws) - (end - start) :]
        draws = [self.draws[bisect_right(self.draws, place, key=lambda draw: draw.first) - 1] for place in places]
        found = [draw.sampled.logprobs[place - draw.first] for draw, place in zip(draws, places, strict=True)]
        return torch.stack(found).tolist() if found else []

    @property
    def busy(self) -> bool:
        """Whether a turn is under way."""
        return bool(self.rows or self.admission.waiting or self.looked_at < len(self.draws))

    def advance(self) -> list[Turn]:
        """Let sequences begin or go on where there is room, else draw one more token for every row. Returns the turns that ended."""
        start = perf_counter()
        if self._should_admit() and (admitted := self.admission.next(self.slots - len(self.rows))):
            self._seat(*admitted)
            self.stats.prefill_seconds += perf_counter() - start
        else:
            if self.rows:
                self._decode()
            elif self.looked_at < len(self.draws):
                self._look(ahead=0)
            else:
                self.admission.make_room()
            self.stats.decode_seconds += perf_counter() - start
        pool = self.admission.pool
        self.stats.peak_pages = max(self.stats.peak_pages, pool.pages - pool.available)
        ended, self.ended = self.ended, []
        return ended

    def _should_admit(self) -> bool:
        """Prefill is worth a forward of its own when some slots are free, not for each one."""
        free, waiting = self.slots - len(self.rows), self.admission.waiting
        return waiting > 0 and (not self.rows or free >= min(waiting, max(1, self.slots // 8)))

    def _prefill(self, tokens: list[list[int]], pages: list[list[int]], past: list[int]) -> HeadOutputs:
        return self._read(self.decoder.prefill(tokens, pages, past))

    def _read(self, hidden: Tensor) -> HeadOutputs:
        return HeadOutputs(self.head.logits(hidden), None if self.value_head is None else self.value_head(hidden))

    def _seat(self, sequences: list[Sequence], outputs: HeadOutputs) -> None:
        """Rows for sequences, and the first tokens of their turns."""
        first = len(self.rows)
        self.rows += [_Row(s, len(s.tokens), 1 if s.cut else s.limit) for s in sequences]
        rows, width = slice(first, len(self.rows)), max(len(sequence.pages) for sequence in sequences)
        self.state["sequence"][rows] = self._tensor([sequence.stream for sequence in sequences])
        self.state["length"][rows] = self._tensor([len(sequence.tokens) for sequence in sequences])
        pages = [sequence.pages + [0] * (width - len(sequence.pages)) for sequence in sequences]
        self.block_table[rows, :width] = self._tensor(pages, torch.int32)
        self._draw(first, outputs, ahead=0)  # waits for the prompts: their time is not that of the steps after them

    # Decoding

    def _decode(self) -> None:
        """One more token for every row."""
        active = len(self.rows)
        last, lengths = self.state["last"][:active], self.state["length"][:active]
        hidden = self.decoder.step(last, lengths, self.block_table[:active])
        self.stats.decode_steps += 1
        self.stats.decode_bytes += self._weight_bytes + self._token_bytes * sum(row.length for row in self.rows)
        self._draw(0, self._read(hidden), ahead=DRAWS_AHEAD.get(self.device.type, 0))

    def _draw(self, first_row: int, outputs: HeadOutputs, *, ahead: int) -> None:
        """Sample for rows first_row.., look at what is due and retire what has finished."""
        rows = self.rows[first_row:]
        state = {name: tensor[first_row : len(self.rows)] for name, tensor in self.state.items()}
        sampled = self._sample(first_row, outputs.logits, state)
        torch.clamp(sampled.tokens, min=0, out=state["last"])  # a row in error may run for a step more
        state["length"] += 1
        for row in rows:
            row.drawn, row.length, row.left = row.drawn + 1, row.length + 1, row.left - 1
        self.draws.append(_Draw.launched(rows, self.drawn, sampled, outputs.values))
        self.drawn += len(rows)
        self._look(ahead=ahead)
        self._retire()

    def _sample(self, first_row: int, logits: Tensor, state: dict[str, Tensor]) -> SampledTokens:
        params, floor, rows = self.usual.sampling, self.usual.sampling.min_new_tokens, self.rows[first_row:]
        options = self._drawing_of(rows)
        streams = dict(seed=params.seed, sequence_ids=state["sequence"], positions=state["length"])
        if not self.stop_ids or all(row.drawn >= floor for row in rows):
            sampled = sample_tokens(logits, **options, **streams)
            if self.head.exact and len(self.drawn_by) == 1:
                return sampled._replace(logprobs=self._logprobs(logits, sampled.tokens))
            return sampled
        early = self._tensor([row.drawn < floor for row in rows], torch.bool)
        stops = self._tensor(sorted(self.stop_ids))
        banned = logits.clone()
        banned[:, stops] = banned[:, stops].masked_fill(early[:, None], -torch.inf)
        sampled = sample_tokens(banned, **options, **streams)
        raw = self._logprobs(logits, sampled.tokens)
        exact = self.head.exact and len(self.drawn_by) == 1
        return sampled._replace(logprobs=raw if exact else torch.where(early, raw, sampled.logprobs))

    def _logprobs(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """fp32 [rows]: of tokens as they are usually drawn, before anything is left out; with the bits of a training forward where it is exact."""
        temperature = self.usual.sampling.temperature or 1.0
        found = token_logprobs(logits, tokens, temperature=temperature, ignore_index=-1, return_entropy=self.head.exact)
        return found.logprobs if self.head.exact else found

    def _drawing_of(self, rows: list[_Row]) -> dict[str, float | Tensor]:
        """How their tokens are drawn: numbers, or where rows differ tensors [rows]."""
        if len(self.drawn_by) == 1:
            return dict(zip(DRAWING, _drawing(self.usual.sampling), strict=True))
        columns = zip(*(_drawing(row.sequence.manner.sampling) for row in rows), strict=True)
        types = [torch.int64 if name == "top_k" else torch.float32 for name in DRAWING]
        return {name: self._tensor(list(x), t) for name, x, t in zip(DRAWING, columns, types, strict=True)}

    def _look(self, *, ahead: int) -> None:
        """Learn all drawn tokens but those of the last `ahead` draws, and which turns they end."""
        while self.looked_at < len(self.draws) - ahead:
            draw = self.draws[self.looked_at]
            self.looked_at += 1
            told = []
            for place, (row, token) in enumerate(zip(draw.rows, draw.look(), strict=True), start=draw.first):
                if row.ended:
                    continue
                self.stats.new_tokens += 1
                self.stats.decode_tokens += row.seen > 0  # the first comes from prefill
                row.seen += 1
                if token >= 0:
                    row.tokens.append(token)
                    row.draws.append(place)
                    told.append((row.sequence.id, token))
                reason = self._reason(row, token)
                if reason is not None:
                    self._end_turn(row, reason)
            if self.on_tokens is not None:
                self.on_tokens(told)

    def _reason(self, row: _Row, token: int) -> FinishReason | None:
        """Why the turn ends with this token; None while it goes on."""
        if token < 0:
            return FinishReason.ERROR
        if token in self.stop_ids:
            return FinishReason.STOP
        stop_strings, floor = row.sequence.manner.stop_strings, self.usual.sampling.min_new_tokens
        if stop_strings is not None and row.seen >= floor and stop_strings.completed_by_last(row.tokens):
            return FinishReason.STOP
        return FinishReason.LENGTH if row.left == 0 and row.seen == row.drawn else None

    def _end_turn(self, row: _Row, reason: FinishReason) -> None:
        row.ended, sequence = True, row.sequence
        start = len(sequence.tokens)
        sequence.tokens += row.tokens
        sequence.draws += row.draws
        sequence.chosen.append((start, len(sequence.tokens)))
        sequence.finish_reason = reason
        if self.many_turns:
            self.admission.rest(sequence)
        self.ended.append(sequence.turn)

    def _retire(self) -> None:
        """Take rows out that have ended or have had their last draw, then move rows from the end into the gaps."""
        finished = {place for place, row in enumerate(self.rows) if row.ended or row.left == 0}
        if not finished:
            return
        if not self.many_turns:
            for place in finished:
                self.admission.forget(self.rows[place].sequence)
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

    def pack(self) -> Rollout:
        """All sequences in the order of their numbers. No turn is under way."""
        columns = zip(*(draw.sampled for draw in self.draws), strict=True)
        sampled = SampledTokens(*(torch.cat(column) for column in columns))
        values = None if self.value_head is None else torch.cat([draw.values for draw in self.draws])
        return pack(self.sequences, sampled, values, float(self.usual.sampling.temperature), self.device)

    def _tensor(self, values: list, dtype: torch.dtype = torch.int64) -> Tensor:
        return on_device(values, self.device, dtype)


def _drawing(sampling: SamplingParams) -> tuple[float, ...]:
    return tuple(getattr(sampling, name) for name in DRAWING)


def _bytes_read_a_step(model: PreTrainedModel) -> int:
    """All weights that this rank has but an input embedding of its own, of which a step reads a few lines."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    read = (local_part(p) for p in model.parameters() if p is not embedding or embedding is head)
    return sum(p.nbytes for p in read)
