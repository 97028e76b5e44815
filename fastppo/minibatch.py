"""Which sequences are learned from together: minibatches (one optimizer step each) and micro-batches (one forward and backward each)."""

from __future__ import annotations

import torch
from torch import Tensor


def split_minibatches(num_sequences: int, num_minibatches: int, generator: torch.Generator) -> list[list[int]]:
    """A random partition into at most `num_minibatches` parts whose sizes differ by at most one; none is empty."""
    order = torch.randperm(num_sequences, generator=generator).tolist()
    parts = min(num_minibatches, num_sequences)
    return [order[num_sequences * i // parts : num_sequences * (i + 1) // parts] for i in range(parts)]


def split_microbatches(indices: list[int], lengths: Tensor, max_tokens: int) -> list[list[int]]:
    """Group `indices` into micro-batches of at most `max_tokens` tokens; a longer sequence stands alone.

    Sorted by length, so that a micro-batch holds sequences of similar length and attention wastes little on padding.
    """
    groups: list[list[int]] = []
    room = 0
    for index in sorted(indices, key=lambda i: (-int(lengths[i]), i)):
        length = int(lengths[index])
        if not groups or length > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(index)
        room -= length
    return groups


def plan_epochs(
    lengths: Tensor, *, epochs: int, num_minibatches: int, max_tokens: int, seed: int
) -> list[list[list[list[int]]]]:
    """plan[epoch][minibatch][microbatch] = sequence indices; a function of its arguments alone, so that a resumed run repeats it.

    lengths: int64 [B], tokens of each sequence.
    """
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            split_microbatches(minibatch, lengths, max_tokens)
            for minibatch in split_minibatches(len(lengths), num_minibatches, generator)
        ]
        for _ in range(epochs)
    ]
