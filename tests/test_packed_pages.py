"""Packed sequences on pages: each token finds the tokens before it where a sampler would have put them."""

from __future__ import annotations

import pytest
import torch

from fastppo.model import SharedPrompts
from fastppo.model.packed_pages import PAGE_SIZE, PackedPages

CPU = torch.device("cpu")
# Tokens of each sequence, of its prompt, and which prompt: alone and shared; shorter than a page, of one, beyond; nothing before or behind.
BATCHES = {
    "alone": ([3, 64, 65, 200], [1, 10, 65, 129], [0, 1, 2, 3]),
    "shared": ([5, 7, 9, 70], [5, 5, 5, 5], [0, 0, 0, 0]),
    "full pages": ([130, 128, 260], [128, 128, 128], [0, 0, 0]),
    "several": ([70, 69, 66, 66, 3, 140, 1], [66, 66, 66, 66, 3, 1, 1], [4, 4, 4, 4, 0, 2, 2]),
    "no prompts": ([4, 0, 5], [0, 0, 0], [0, 0, 0]),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("shares", [False, True])
def test_each_token_finds_what_stands_before_it(name, shares):
    lengths, prompt_lengths, groups = BATCHES[name]
    prompts = {group: torch.arange(1000 * group, 1000 * group + 999) for group in groups}
    sequences = [
        torch.cat([prompts[group][:prompt], torch.arange(10**6 * (i + 1), 10**6 * (i + 1) + length - prompt)])
        for i, (length, prompt, group) in enumerate(zip(lengths, prompt_lengths, groups, strict=True))
    ]
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    shared = SharedPrompts(bounds, prompt_lengths, groups, CPU) if shares else None
    pages, tokens = PackedPages.of(bounds, shared, CPU), torch.cat(sequences)
    running, rows = (tokens, torch.arange(len(tokens))) if shared is None else (tokens[shared.tokens], shared.rows)

    places = torch.full((pages.pages * PAGE_SIZE,), -1)
    places[pages.slots] = running
    assert int((places >= 0).sum()) == len(running), "two tokens in one place"
    if pages.copied is not None:
        source, target = pages.copied
        assert (places[target] == -1).all(), "a copy over a token"
        places[target] = places[source]
    for sequence, start in zip(sequences, bounds, strict=False):
        for place in range(len(sequence)):
            row = rows[start + place]
            seen = places.view(-1, PAGE_SIZE)[pages.block_table[row].long()].flatten()[: pages.lengths[row]]
            assert torch.equal(seen, sequence[: place + 1])
    assert pages.longest == max(lengths)


def test_prompts_are_named_as_packed_attention_takes_them():
    lengths, prompt_lengths, groups = BATCHES["several"]
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    pages = PackedPages.of(bounds, SharedPrompts(bounds, prompt_lengths, groups, CPU), CPU)
    assert pages.cu_seqlens.tolist() == [0, 66, 69, 70, 74, 77, 77, 77, 216, 216]
    assert pages.prompts.tolist() == [-1, -1, -1, 0, 0, 0, 0, 2, 2]
