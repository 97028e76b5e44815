"""Packed sequences in the pages of a key-value cache, as a sampler has them: each packed token can then be a row of a decode step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastppo.model.host import on_device
from fastppo.model.shared_prompts import SharedPrompts

PAGE_SIZE = 64


class PackedPages(NamedTuple):
    """T packed tokens of S sequences, of which some follow an earlier one, their prompt, and share its full pages.

    cu_seqlens int32 [S + 1] and prompts int32 [S] are as `packed_attention` takes them. lengths int64 [T]: tokens that each sees, itself included.
    block_table int32 [T, blocks]: the pages of each token's sequence. slots int64 [T]: the place of its key, page * PAGE_SIZE + offset.
    copied: int64 [C] each, places of what a prompt leaves on a page that it does not fill, and those where a sequence that follows it has
    them before its own. pages: how many. longest: tokens of a sequence, its prompt included.
    """

    cu_seqlens: Tensor
    prompts: Tensor | None
    lengths: Tensor
    block_table: Tensor
    slots: Tensor
    copied: tuple[Tensor, Tensor] | None
    pages: int
    longest: int

    @classmethod
    def of(cls, bounds: Sequence[int], shared: SharedPrompts | None, device: torch.device) -> PackedPages:
        """bounds: S + 1 places; with `shared`, the places of what runs are its own."""
        counts, prompts = _sequences(bounds, shared)
        pages, tables, lengths, slots, sources, targets = 0, [], [], [], [], []
        for count, prompt in zip(counts, prompts, strict=True):
            before = 0 if prompt < 0 else counts[prompt]
            full, tail = divmod(before, PAGE_SIZE)
            theirs = tables[prompt] if before else _range(0)
            own = -(-(before + count) // PAGE_SIZE) - full if count else 0
            table = torch.cat([theirs[:full], _range(pages, pages + own)])
            pages += own
            positions = _range(before, before + count)
            tables.append(table)
            lengths.append(positions + 1)
            slots.append(_slots(table, positions))
            if count and tail:
                places = _range(before - tail, before)
                sources.append(_slots(theirs, places))
                targets.append(_slots(table, places))
        owners = _range(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64, device="cpu"))
        block_table = pad_sequence(tables, batch_first=True)[owners]
        return cls(
            cu_seqlens=on_device(_ends(counts), device, torch.int32),
            prompts=None if shared is None else on_device(prompts, device, torch.int32),
            lengths=on_device(torch.cat(lengths), device),
            block_table=on_device(block_table, device, torch.int32),
            slots=on_device(torch.cat(slots), device),
            copied=tuple(on_device(torch.cat(x), device) for x in (sources, targets)) if sources else None,
            pages=pages,
            longest=int(torch.cat(lengths).max()),
        )


def _sequences(bounds: Sequence[int], shared: SharedPrompts | None) -> tuple[list[int], list[int]]:
    """(tokens of each sequence, the number of its prompt or -1), in the order in which they run."""
    roots = bounds if shared is None else shared.root_bounds
    counts = [end - start for start, end in pairwise(roots)]
    prompts = [-1] * len(counts)
    numbers = {start: number for number, (start, end) in enumerate(pairwise(roots)) if end > start}
    for branch in () if shared is None else shared.branches:
        suffixes = [end - start for start, end in pairwise(branch.bounds)]
        counts += suffixes
        prompts += [numbers[branch.start]] * len(suffixes)
    return counts, prompts


def _ends(counts: list[int]) -> Tensor:
    """[S] -> [S + 1]: where each sequence begins, and the last one ends."""
    return torch.tensor(list(chain([0], counts)), dtype=torch.int64, device="cpu").cumsum(0)


def _range(*bounds: int) -> Tensor:
    return torch.arange(*bounds, dtype=torch.int64, device="cpu")


def _slots(table: Tensor, positions: Tensor) -> Tensor:
    """The places of a sequence's tokens at these positions."""
    return table[positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
