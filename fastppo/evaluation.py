"""What the networks said about a rollout before it was learned from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastppo.rollout.record import ActionRecord


@dataclass(frozen=True, eq=False)
class Evaluation(ActionRecord):
    """Made by `Roles.evaluate`, as far as the algorithm asked."""

    logprobs: Tensor | None = None
    """fp32 [N], the policy's: what the ratio is taken against."""
    values: Tensor | None = None
    """fp32 [N], of the state before each action."""
    final_values: Tensor | None = None
    """fp32 [B], of the state after each sequence's last token."""
    ref_logprobs: Tensor | None = None
    """fp32 [N], the frozen reference's."""

    PER_SEQUENCE = ("final_values",)
