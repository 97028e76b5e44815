"""What the networks are to learn from a rollout."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastppo.rollout.record import ActionRecord


@dataclass(frozen=True, eq=False)
class Targets(ActionRecord):
    """Made by `Algorithm.credit`."""

    advantages: Tensor | None = None
    """fp32 [N]"""
    returns: Tensor | None = None
    """fp32 [N], what the critic is to say."""
