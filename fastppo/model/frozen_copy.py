"""A model as it was at one moment, to sample from while the model itself learns."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastppo.model.adapters import Adapters


class FrozenCopy:
    """Copies what learns, into memory that stays where it is, so that decoders and CUDA graphs that were made for it go on to serve; what is
    frozen (the weights beside adapters) is shared.

    Args:
        original: a prepared model. adapters: of it, where it has some; the copy has its own.
    """

    def __init__(self, original: PreTrainedModel, adapters: Adapters | None = None) -> None:
        self._original = original
        memo = {id(parameter): parameter for parameter in original.parameters() if not parameter.requires_grad}
        self.adapters = copy.deepcopy(adapters, memo)
        self.model: PreTrainedModel = copy.deepcopy(original, memo) if adapters is None else self.adapters.model
        self._copied = {name: own for name, own in self.model.named_parameters() if own.requires_grad}
        for own in self._copied.values():
            own.requires_grad_(False)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weights that the original has now."""
        weights = dict(self._original.named_parameters())
        for name, own in self._copied.items():
            own.copy_(weights[name])

    def state_dict(self) -> dict[str, Tensor]:
        """What is copied, not copied again."""
        return {name: own.detach() for name, own in self._copied.items()}

    @torch.no_grad()
    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Take over the weights of `state_dict`, of the same model."""
        for name, own in self._copied.items():
            own.copy_(saved[name])
