"""Sequences that are being sampled: what was given, what the policy chose, turn by turn, and where their keys and values lie."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.model.host import on_device
from fastppo.ops import SampledTokens
from fastppo.rollout.pages import pages_for
from fastppo.rollout.record import bounds_of
from fastppo.rollout.rollout import FinishReason, Rollout
from fastppo.rollout.sampling import SamplingParams
from fastppo.rollout.stopping import StopStrings


class Turn(NamedTuple):
    """What the policy said in one go."""

    id: int
    """Of the sequence."""
    tokens: list[int]
    """Those it chose, a stop id included."""
    finish_reason: FinishReason


class Manner(NamedTuple):
    """How a sequence's turns are sampled."""

    sampling: SamplingParams
    stop_strings: StopStrings | None


@dataclass
class Sequence:
    """A conversation as the host knows it."""

    id: int
    stream: int  # its draws come from this number
    prompt: int  # which prompt it continues
    tokens: list[int]  # given and chosen
    manner: Manner
    limit: int = 0  # tokens that its turn may get
    chosen: list[tuple[int, int]] = field(default_factory=list)  # start and end of each turn in `tokens`
    draws: list[int] = field(default_factory=list)  # of each chosen token, its place among all draws
    pages: list[int] = field(default_factory=list)
    cached: int = 0  # tokens whose keys and values are in its pages
    finish_reason: FinishReason | None = None  # None while a turn is under way
    closed: bool = False
    cut: bool = False  # its turn is to end with the next token

    @property
    def pages_for_turn(self) -> int:
        """Pages that it needs to the end of its turn. The last token is drawn and never run."""
        return pages_for(len(self.tokens) + self.limit - 1)

    @property
    def turn(self) -> Turn:
        """The last one."""
        start, end = self.chosen[-1]
        return Turn(self.id, self.tokens[start:end], self.finish_reason)


def pack(
    sequences: Many[Sequence], sampled: SampledTokens, values: Tensor | None, temperature: float, device: torch.device
) -> Rollout:
    """The sequences as one record; `sampled` and `values` are of all draws, one after another."""
    lengths = [len(sequence.tokens) for sequence in sequences]
    tokens = _flat([sequence.tokens for sequence in sequences], device)
    draws = _flat([sequence.draws for sequence in sequences], device)
    bounds = on_device(bounds_of(lengths), device)
    counts = on_device(lengths, device)
    positions = torch.arange(len(tokens), dtype=torch.int64, device=device)
    return Rollout(
        tokens=tokens,
        cu_seqlens=bounds.int(),
        position_ids=positions - bounds[:-1].repeat_interleave(counts),
        action_mask=_action_mask(sequences, device),
        logprobs=sampled.logprobs[draws].float(),  # a model in fp64 gives fp64
        processed_logprobs=sampled.processed_logprobs[draws].float(),
        finish_reasons=on_device([int(sequence.finish_reason) for sequence in sequences], device, torch.int8),
        prompt_index=on_device([sequence.prompt for sequence in sequences], device),
        temperature=temperature,
        values=None if values is None else values[draws],
    )


def _flat(lists: list[list[int]], device: torch.device) -> Tensor:
    return on_device([number for numbers in lists for number in numbers], device)


def _action_mask(sequences: Many[Sequence], device: torch.device) -> Tensor:
    """bool [T]"""
    runs, chosen = [], []
    for sequence in sequences:
        end = 0
        for start, stop in sequence.chosen:
            runs += [start - end, stop - start]
            chosen += [False, True]
            end = stop
        runs.append(len(sequence.tokens) - end)
        chosen.append(False)
    return on_device(chosen, device, torch.bool).repeat_interleave(on_device(runs, device))
