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
    rollout_logprobs: Tensor | None = None
    """fp32 [N]: exp(old log-prob - this) is the weight of an action that corrects for how it was sampled; None: no correction."""
    kept: Tensor | None = None
    """bool [B], whose actions are learned from; None: all."""
    positive: Tensor | None = None
    """bool [B], whose actions are to become likelier whatever their advantages; None: nobody's."""

    PER_SEQUENCE = ("kept", "positive")
