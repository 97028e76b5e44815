"""What the records of a step share: packed tensors of which a few sequences are taken, by numbers that the host knows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from fastppo.model.host import on_device


def bounds_of(lengths: Iterable[int]) -> list[int]:
    """[B] -> [B + 1]: where each of B parts laid end to end begins, and where the last one ends."""
    return list(accumulate(lengths, initial=0))


def lengths_of(bounds: Sequence[int]) -> list[int]:
    """[B + 1] -> [B]"""
    return [end - start for start, end in zip(bounds, bounds[1:], strict=False)]


def places_in(bounds: Sequence[int], indices: Sequence[int]) -> Tensor:
    """int64 on the host: the places of the parts at `indices`, side by side."""
    ranges = [torch.arange(bounds[i], bounds[i + 1], dtype=torch.int64, device="cpu") for i in indices]
    return torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.int64, device="cpu")


Kind = TypeVar("Kind", bound="ActionRecord")


@dataclass(frozen=True, eq=False)
class ActionRecord:
    """fp32 tensors with an entry for each of N actions, or for each of B sequences; None where nothing needed them."""

    action_bounds: Sequence[int]
    """B + 1 numbers: the actions of sequence i are `action_bounds[i]:action_bounds[i + 1]`."""

    def __post_init__(self) -> None:
        for name, value in self._tensors().items():
            size = self.num_sequences if name in self.PER_SEQUENCE else self.num_actions
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} is {type(value).__name__}, expected a torch.Tensor")
            if value.shape != (size,):
                raise ValueError(f"{name} has shape {list(value.shape)}, expected [{size}]")

    PER_SEQUENCE = ()
    """Names of the tensors with an entry for each sequence."""

    @property
    def num_sequences(self) -> int:
        return len(self.action_bounds) - 1

    @property
    def num_actions(self) -> int:
        return self.action_bounds[-1]

    def select(self: Kind, indices: Sequence[int]) -> Kind:
        """The sequences at `indices`, in that order."""
        lengths = lengths_of(self.action_bounds)
        tensors = self._tensors()
        if not tensors:
            return replace(self, action_bounds=bounds_of(lengths[i] for i in indices))
        device = next(iter(tensors.values())).device
        actions, sequences = on_device(places_in(self.action_bounds, indices), device), on_device(list(indices), device)
        taken = {name: x[sequences if name in self.PER_SEQUENCE else actions] for name, x in tensors.items()}
        return replace(self, action_bounds=bounds_of(lengths[i] for i in indices), **taken)

    def _tensors(self) -> dict[str, Tensor]:
        found = {spec.name: getattr(self, spec.name) for spec in fields(self) if spec.name != "action_bounds"}
        return {name: value for name, value in found.items() if value is not None}
