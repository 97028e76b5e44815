"""What the rewards of a step come to: one number a sequence, by name too, with the invalid ones marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastppo.model.host import on_device
from fastppo.rewards.result import RewardResult
from fastppo.rollout.rollout import FinishReason, Rollout


@dataclass(frozen=True, eq=False)
class Scores:
    """Of B sequences. NaN is the only mark of an invalid score: it is never a silent 0, and never trained on."""

    values: Tensor
    """fp32 [B], what is maximised."""
    parts: Mapping[str, Tensor]
    """fp32 [B] of each reward function, by its name."""
    baselines: Tensor | None = None
    """fp32 [B], the score of the prompt's greedy completion, where the algorithm asked for it."""

    @classmethod
    def of(cls, result: RewardResult, device: torch.device) -> Scores:
        parts = {name: on_device(scores, device, torch.float32) for name, scores in result.by_name.items()}
        return cls(on_device(result.scores, device, torch.float32), parts)

    @classmethod
    def joined(cls, scores: Sequence[Scores]) -> Scores:
        """Of all their sequences, one after another."""
        parts = {name: torch.cat([one.parts[name] for one in scores]) for name in scores[0].parts}
        baselines = None if scores[0].baselines is None else torch.cat([one.baselines for one in scores])
        return cls(torch.cat([one.values for one in scores]), parts, baselines)

    def penalised(self, rollout: Rollout, penalty: float) -> Scores:
        """Less `penalty` for every completion that was cut off; decided by the finish reason, not by its length."""
        cut_off = rollout.finish_reasons == FinishReason.LENGTH
        return replace(self, values=torch.where(cut_off, self.values - penalty, self.values))

    def select(self, indices: Sequence[int]) -> Scores:
        """The sequences at `indices`, in that order."""
        chosen = on_device(list(indices), self.values.device)
        baselines = None if self.baselines is None else self.baselines[chosen]
        return Scores(self.values[chosen], {name: part[chosen] for name, part in self.parts.items()}, baselines)
