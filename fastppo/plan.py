"""Which sequences are learned from together: minibatches (one optimizer step each) and micro-batches (one forward and backward each)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Microbatch = list[int]
Minibatch = list[Microbatch]
Plan = list[list[Minibatch]]
"""plan[epoch][minibatch][microbatch] = sequence indices."""


def split_minibatches(num_sequences: int, num_minibatches: int, generator: torch.Generator) -> list[list[int]]:
    """A random partition into at most `num_minibatches` parts whose sizes differ by at most one; none is empty."""
    order = torch.randperm(num_sequences, generator=generator, dtype=torch.int64, device="cpu").tolist()
    parts = min(num_minibatches, num_sequences)
    return [order[num_sequences * i // parts : num_sequences * (i + 1) // parts] for i in range(parts)]


def split_microbatches(indices: Sequence[int], lengths: Sequence[int], max_tokens: int) -> Minibatch:
    """Group `indices` into micro-batches of at most `max_tokens` tokens; a longer sequence stands alone.

    Sorted by length, so that a micro-batch holds sequences of similar length and attention wastes little on padding.
    """
    groups: Minibatch = []
    room = 0
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        if not groups or lengths[index] > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(index)
        room -= lengths[index]
    return groups


def plan_epochs(lengths: Sequence[int], *, epochs: int, num_minibatches: int, max_tokens: int, seed: int) -> Plan:
    """A function of its arguments alone, so that a resumed run repeats it. lengths: [B] tokens of each sequence."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            split_microbatches(minibatch, lengths, max_tokens)
            for minibatch in split_minibatches(len(lengths), num_minibatches, generator)
        ]
        for _ in range(epochs)
    ]


def first_epoch(plan: Plan) -> list[Microbatch]:
    """The micro-batches in which a first pass sees every sequence once."""
    return [microbatch for minibatch in plan[0] for microbatch in minibatch]
