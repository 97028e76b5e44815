"""Which sequences are learned from together: minibatches (one optimizer step each) and micro-batches (one forward and backward each)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastppo.rollout.rollout import Rollout

Microbatch = list[int]
Minibatch = list[Microbatch]
Plan = list[list[Minibatch]]
"""plan[epoch][minibatch][microbatch] = sequence indices. Of R ranks each has every R-th micro-batch, from its own number on: all have as many, of
which some may be empty."""

EVEN = 1.05
"""Most tokens of a rank in a minibatch, as a multiple of the mean, for which the samples of a prompt stay on one rank."""


class Lengths(NamedTuple):
    """[B] each: what sequences cost. Those of one group share their prompt, which costs its tokens once a micro-batch."""

    sequences: Sequence[int]
    prompts: Sequence[int]
    groups: Sequence[int]

    @classmethod
    def of(cls, rollout: Rollout) -> Lengths:
        return cls(rollout.lengths, rollout.prompt_lengths, rollout.prompt_groups)

    def members(self, indices: Sequence[int]) -> list[list[int]]:
        """`indices` by group, in the order in which the groups come."""
        found: dict[int, list[int]] = {}
        for index in indices:
            found.setdefault(self.groups[index], []).append(index)
        return list(found.values())


def split_minibatches(lengths: Lengths, num_minibatches: int, generator: torch.Generator) -> list[list[int]]:
    """A random partition into at most `num_minibatches` parts whose sizes differ by at most one; none is empty.

    The samples of a prompt stand side by side in the order that is cut, so that at most one group is cut between two parts.
    """
    count = len(lengths.sequences)
    members = lengths.members(range(count))
    drawn = torch.randperm(len(members), generator=generator, dtype=torch.int64, device="cpu").tolist()
    order = [index for group in drawn for index in members[group]]
    parts = min(num_minibatches, count)
    return [order[count * i // parts : count * (i + 1) // parts] for i in range(parts)]


def split_microbatches(indices: Sequence[int], lengths: Lengths, max_tokens: int, ranks: int = 1) -> Minibatch:
    """Group `indices` into micro-batches that run at most `max_tokens` tokens; a longer sequence stands alone. Of several ranks each gets as many
    micro-batches, and about as many tokens.
    """
    shares = _even_shares(indices, lengths, max_tokens, ranks)
    most = max(map(len, shares))
    padded = [share + [[]] * (most - len(share)) for share in shares]
    return [list(batch) for row in zip(*padded, strict=True) for batch in row]


def _even_shares(indices: Sequence[int], lengths: Lengths, max_tokens: int, ranks: int) -> list[Minibatch]:
    """Each rank's micro-batches, of about as many tokens: the samples of a prompt on one rank where that is within `EVEN`, else sequence by
    sequence."""
    if ranks == 1:
        return [_split(indices, lengths, max_tokens)]
    found = []
    for parts in (lengths.members(indices), [[index] for index in indices]):
        found.append([_split(share, lengths, max_tokens) for share in _spread(parts, lengths, ranks)])
        if _unevenness(found[-1], lengths) <= EVEN:
            return found[-1]
    return min(found, key=lambda shares: _unevenness(shares, lengths))


def _spread(parts: Sequence[list[int]], lengths: Lengths, ranks: int) -> list[list[int]]:
    """The largest part first, each to the rank that has the fewest tokens (Graham 1969, longest processing time first)."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    tokens, prompts = [0] * ranks, [set[int]() for _ in range(ranks)]
    for part in sorted(parts, key=lambda part: (-tokens_of(part, lengths), part[0])):
        rank, group = tokens.index(min(tokens)), lengths.groups[part[0]]
        shares[rank] += part
        tokens[rank] += tokens_of(part, lengths) - (lengths.prompts[part[0]] if group in prompts[rank] else 0)
        prompts[rank].add(group)
    return shares


def _unevenness(shares: Sequence[Minibatch], lengths: Lengths) -> float:
    """The most tokens that a rank runs, as a multiple of the mean."""
    tokens = [sum(tokens_of(batch, lengths) for batch in share) for share in shares]
    return max(tokens) * len(tokens) / max(sum(tokens), 1)


def _split(indices: Sequence[int], lengths: Lengths, max_tokens: int) -> Minibatch:
    """Micro-batches of one rank.

    The samples of a prompt stand side by side, the longest first, and a group that does not fit goes on in the next micro-batch with its
    prompt once more. Groups are sorted by their longest sequence, so that attention wastes little on padding.
    """

    def longest_first(index: int) -> tuple[int, int]:
        return -lengths.sequences[index], index

    groups = sorted(
        (sorted(own, key=longest_first) for own in lengths.members(indices)), key=lambda own: longest_first(own[0])
    )
    batches: Minibatch = []
    room, prompt = 0, None
    for index in (index for own in groups for index in own):
        cost = lengths.sequences[index]
        if lengths.groups[index] == prompt:
            cost -= lengths.prompts[index]
        if not batches or cost > room:
            batches.append([])
            room, cost = max_tokens, lengths.sequences[index]
        batches[-1].append(index)
        room, prompt = room - cost, lengths.groups[index]
    return batches


def tokens_of(microbatch: Microbatch, lengths: Lengths) -> int:
    """How many run: a prompt's once for all its samples."""
    groups = lengths.members(microbatch)
    return sum(lengths.sequences[i] for own in groups for i in own) - sum(
        lengths.prompts[own[0]] * (len(own) - 1) for own in groups
    )


def split_again(plan: Plan, lengths: Lengths, max_tokens: int, ranks: int = 1) -> Plan:
    """The same minibatches in micro-batches of another size: what `plan_epochs` gives for it."""
    return [
        [
            split_microbatches([i for batch in minibatch for i in batch], lengths, max_tokens, ranks)
            for minibatch in epoch
        ]
        for epoch in plan
    ]


def split_groups_warning(lengths: Lengths, max_tokens: int) -> str | None:
    """A sentence where no micro-batch holds all samples of some prompt."""
    for own in lengths.members(range(len(lengths.sequences))):
        prompt = lengths.prompts[own[0]]
        tokens = prompt + sum(lengths.sequences[index] - prompt for index in own)
        if len(own) > 1 and tokens > max_tokens:
            return (
                f"the samples of some prompts have more than learner.tokens_per_microbatch = {max_tokens} tokens together: "
                f"such a prompt is run more than once, which a larger budget would spare"
            )
    return None


def plan_epochs(
    lengths: Lengths, *, epochs: int, num_minibatches: int, max_tokens: int, seed: int, ranks: int = 1
) -> Plan:
    """A function of its arguments alone, so that a resumed run repeats it; the minibatches are the same for any number of ranks."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            split_microbatches(minibatch, lengths, max_tokens, ranks)
            for minibatch in split_minibatches(lengths, num_minibatches, generator)
        ]
        for _ in range(epochs)
    ]


def first_epoch(plan: Plan) -> list[Microbatch]:
    """The micro-batches in which a first pass sees every sequence once."""
    return [microbatch for minibatch in plan[0] for microbatch in minibatch]
