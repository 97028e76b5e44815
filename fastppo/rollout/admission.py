"""Which sequences may begin or go on: whose turn it is, and whether there are pages for all that it may come to."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.model.host import on_device
from fastppo.rollout.decoder import PREFILL_TOKENS
from fastppo.rollout.pages import PAGE_SIZE, PagedCache, PagePool, pages_for
from fastppo.rollout.sequences import Sequence
from fastppo.rollout.stats import GenerationStats


class HeadOutputs(NamedTuple):
    """What the heads say of the state after the newest token of some sequences."""

    logits: Tensor
    """fp32 [sequences, V]"""
    values: Tensor | None
    """fp32 [sequences], where there is a value head."""

    def take(self, rows: Tensor) -> HeadOutputs:
        return HeadOutputs(self.logits[rows], None if self.values is None else self.values[rows])


Prefill = Callable[[list[list[int]], list[list[int]], list[int]], HeadOutputs]
"""Tokens of sequences, their pages, and how many tokens are in these already -> what the heads say after the last ones."""


@dataclass
class _Prompt:
    """A prompt whose samples share what is computed of it."""

    tokens: list[int]
    total: int  # samples
    waiting: deque[Sequence]  # those to begin
    pages: list[int] = field(default_factory=list)  # while some wait

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
        """Pages of a sample's own."""
        return self.waiting[0].pages_for_turn - self.full_pages

    @property
    def least_pages(self) -> int:
        """With which one sample can run while the others wait: they copy the partial page later."""
        return self.full_pages + self.own_pages + (self.partial_pages if self.total > 1 else 0)


class _Prefilled(NamedTuple):
    """Prompts that have been run, some of whose samples are still to begin."""

    prompts: list[_Prompt]
    outputs: HeadOutputs  # after each prompt's last token


class Admission:
    """The pages, and the sequences that are not being decoded: samples of prompts, and turns that follow upon a turn.

    A turn begins only when all pages that it may come to need are free, so none is ever broken off. Between turns a sequence keeps its pages
    until they are needed for another and nothing else can run; what was in them is then computed again.
    """

    def __init__(self, cache: PagedCache, prefill: Prefill, device: torch.device, stats: GenerationStats) -> None:
        self.pool = PagePool(cache.pages)
        self.waiting = 0  # sequences that are to begin or go on
        self._cache, self._prefill, self._device, self._stats = cache, prefill, device, stats
        self._new: deque[_Prompt] = deque()  # to be run
        self._prefilled: _Prefilled | None = None
        self._resuming: deque[Sequence] = deque()  # what they were given since their last turn is to be run
        self._resting: dict[int, Sequence] = {}  # between two turns, the longest first

    # Whose turn it is

    def add(self, name: str, prompt: list[int], samples: list[Sequence]) -> None:
        """Samples of one prompt. Raises ValueError where there will never be pages for one of them."""
        new = _Prompt(prompt, len(samples), deque(samples))
        self.require_room(name, samples[0], new.least_pages)
        self._new.append(new)
        self.waiting += len(samples)

    def require_room(self, name: str, sequence: Sequence, pages: int) -> None:
        """Raises ValueError where there will never be pages for the sequence's turn."""
        if pages > self.pool.pages:
            page = self._cache.bytes_per_page / 2**30
            raise ValueError(
                f"{name} with {len(sequence.tokens)} tokens and {sequence.limit} new ones needs {pages * page:.3g} GiB of keys and values, "
                f"expected at most {self.pool.pages * page:.3g} GiB (kv_memory)"
            )

    def rest(self, sequence: Sequence) -> None:
        """Its turn has ended, and another may follow. The last token was drawn and is not in the cache."""
        sequence.cached = len(sequence.tokens) - 1
        kept = pages_for(sequence.cached)
        self.pool.release(sequence.pages[kept:])
        sequence.pages = sequence.pages[:kept]
        self._resting[sequence.id] = sequence

    def resume(self, sequence: Sequence) -> None:
        """It has been given tokens and gets another turn."""
        self._resting.pop(sequence.id, None)
        self._resuming.append(sequence)
        self.waiting += 1

    def share(self, sequence: Sequence, twin: Sequence) -> None:
        """The twin has the same past: the full pages are shared, and what is in the last one is run again."""
        full = sequence.cached // PAGE_SIZE
        twin.pages, twin.cached = sequence.pages[:full], full * PAGE_SIZE
        self.pool.share(twin.pages)
        self._resting[twin.id] = twin

    def forget(self, sequence: Sequence) -> None:
        """Its pages are free."""
        self.pool.release(sequence.pages)
        sequence.pages, sequence.cached = [], 0
        self._resting.pop(sequence.id, None)

    def make_room(self) -> None:
        """Nothing runs for want of pages: who has rested longest gives its own back, else the last in the queue. Either runs again later."""
        held = (s for s in (*self._resting.values(), *reversed(self._resuming)) if s.pages)
        sequence = next(held)
        self.pool.release(sequence.pages)
        sequence.pages, sequence.cached = [], 0

    # Who begins

    def next(self, free: int) -> tuple[list[Sequence], HeadOutputs] | None:
        """Sequences that take some of `free` rows now, and what their next tokens are drawn from; None where none can."""
        return (self._resume(free) or self._begin(free)) if self.waiting and free else None

    def _resume(self, free: int) -> tuple[list[Sequence], HeadOutputs] | None:
        """What sequences were given, and what of their past is in no page, is run in one forward."""
        chosen: list[Sequence] = []
        tokens = 0
        while self._resuming and len(chosen) < free:
            sequence = self._resuming[0]
            missing = sequence.pages_for_turn - len(sequence.pages)
            tokens += len(sequence.tokens) - sequence.cached
            if missing > self.pool.available or (chosen and tokens > PREFILL_TOKENS):
                break
            sequence.pages += self.pool.take(missing)
            chosen.append(self._resuming.popleft())
        if not chosen:
            return None
        self.waiting -= len(chosen)
        rest = [sequence.tokens[sequence.cached :] for sequence in chosen]
        return chosen, self._run(rest, [s.pages for s in chosen], [s.cached for s in chosen])

    def _begin(self, free: int) -> tuple[list[Sequence], HeadOutputs] | None:
        """Samples of the next prompts."""
        if self._prefilled is None:
            if not (self._new and self._startable(self._new[0], free)):
                return None
            self._prefilled = self._run_prompts(free)
        prompts, outputs = self._prefilled
        chosen: list[Sequence] = []
        owners: list[int] = []
        for index, prompt in enumerate(prompts):
            begun = self._start(prompt, self._startable(prompt, free - len(chosen)))
            chosen += begun
            owners += [index] * len(begun)
            if prompt.waiting:
                break
        if not prompts[-1].waiting:
            self._prefilled = None
        self.waiting -= len(chosen)
        return (chosen, outputs.take(self._tensor(owners))) if chosen else None

    def _run_prompts(self, free: int) -> _Prefilled:
        """The next prompts, packed: as many as all their samples can begin at once, at least one."""
        tokens, samples, pages = 0, 0, self.pool.available
        prompts: list[_Prompt] = []
        while self._new:
            prompt = self._new[0]
            tokens += len(prompt.tokens)
            samples += prompt.total
            pages -= prompt.full_pages + prompt.total * prompt.own_pages
            if prompts and (tokens > PREFILL_TOKENS or pages < 0 or samples > free):
                break
            prompts.append(self._new.popleft())
        for prompt in prompts:
            prompt.pages = self.pool.take(pages_for(len(prompt.tokens)))
        outputs = self._run([p.tokens for p in prompts], [p.pages for p in prompts], [0] * len(prompts))
        return _Prefilled(prompts, outputs)

    def _run(self, tokens: list[list[int]], pages: list[list[int]], past: list[int]) -> HeadOutputs:
        self._stats.prefill_tokens += sum(map(len, tokens))
        return self._prefill(tokens, pages, past)

    def _startable(self, prompt: _Prompt, free: int) -> int:
        """How many of the prompt's samples have a row and pages now."""
        left = len(prompt.waiting)
        available = self.pool.available - (0 if prompt.pages else pages_for(len(prompt.tokens)))
        count = min(left, free)
        # The last sample takes over the prompt's own partial page.
        while count and count * prompt.own_pages - (prompt.partial_pages if count == left else 0) > available:
            count -= 1
        return count

    def _start(self, prompt: _Prompt, count: int) -> list[Sequence]:
        """The prompt's next samples, with pages."""
        if not count:
            return []
        self._stats.shared_prompt_tokens += len(prompt.tokens) * (count - (len(prompt.waiting) == prompt.total))
        shared, partial = prompt.pages[: prompt.full_pages], prompt.pages[prompt.full_pages :]
        own_pages, begun, copies = prompt.own_pages, [], []
        for _ in range(count):
            sequence = prompt.waiting.popleft()
            if prompt.waiting:
                own = self.pool.take(own_pages)
                self.pool.share(shared)
                copies += own[: len(partial)]
            else:  # the last sample inherits what the prompt held
                own = partial + self.pool.take(own_pages - len(partial))
                prompt.pages = []
            sequence.pages = shared + own
            begun.append(sequence)
        if copies:
            self._cache.copy(self._tensor(partial).expand(len(copies)), self._tensor(copies))
        return begun

    def _tensor(self, values: list[int]) -> Tensor:
        return on_device(values, self._device)
