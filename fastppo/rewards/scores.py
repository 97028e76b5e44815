"""What the rewards of a step come to: one number a sequence, by name too, with the invalid ones marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastppo.model.host import on_device
from fastppo.rewards.result import RewardResult
from fastppo.rollout.record import bounds_of, lengths_of, places_in
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
    by_action: Tensor | None = None
    """fp32 [N], how `values` is paid: what each action earned; None where all of it is paid at the last."""
    action_bounds: Sequence[int] = ()
    """B + 1 numbers, with `by_action`: the actions of sequence i are `action_bounds[i]:action_bounds[i + 1]`."""

    @classmethod
    def of(cls, result: RewardResult, device: torch.device) -> Scores:
        parts = {name: on_device(scores, device, torch.float32) for name, scores in result.by_name.items()}
        return cls(on_device(result.scores, device, torch.float32), parts)

    @classmethod
    def joined(cls, scores: Sequence[Scores]) -> Scores:
        """Of all their sequences, one after another."""
        parts = {name: torch.cat([one.parts[name] for one in scores]) for name in scores[0].parts}
        baselines = None if scores[0].baselines is None else torch.cat([one.baselines for one in scores])
        whole = cls(torch.cat([one.values for one in scores]), parts, baselines)
        if scores[0].by_action is None:
            return whole
        counts = [length for one in scores for length in lengths_of(one.action_bounds)]
        by_action = torch.cat([one.by_action for one in scores])
        return replace(whole, by_action=by_action, action_bounds=bounds_of(counts))

    def paid_by_turn(self, rewards: Tensor, earned: Tensor, rollout: Rollout) -> Scores:
        """Paid as the environment did, and what is not from it at the last action.

        rewards: fp32 [N], the environment's. earned: fp32 [B], their sums, as they are in `values`.
        """
        paid = replace(self, by_action=rewards, action_bounds=rollout.action_bounds)
        return paid._with_last(torch.where(earned.isnan(), 0, self.values - earned))

    def penalised(self, rollout: Rollout, penalty: float) -> Scores:
        """Less `penalty` for every completion that was cut off; decided by the finish reason, not by its length."""
        cut_off = rollout.finish_reasons == FinishReason.LENGTH
        paid = self if self.by_action is None else self._with_last(torch.where(cut_off, -penalty, 0.0))
        return replace(paid, values=torch.where(cut_off, self.values - penalty, self.values))

    def select(self, indices: Sequence[int]) -> Scores:
        """The sequences at `indices`, in that order."""
        chosen = on_device(list(indices), self.values.device)
        baselines = None if self.baselines is None else self.baselines[chosen]
        part = Scores(self.values[chosen], {name: part[chosen] for name, part in self.parts.items()}, baselines)
        if self.by_action is None:
            return part
        counts = lengths_of(self.action_bounds)
        actions = on_device(places_in(self.action_bounds, indices), self.values.device)
        return replace(part, by_action=self.by_action[actions], action_bounds=bounds_of(counts[i] for i in indices))

    def _with_last(self, numbers: Tensor) -> Scores:
        """With these [B] added to what the last action of each sequence is paid, where it has one."""
        lasts = [end - 1 for begin, end in zip(self.action_bounds, self.action_bounds[1:], strict=False) if end > begin]
        having = [i for i, count in enumerate(lengths_of(self.action_bounds)) if count]
        device, by_action = numbers.device, self.by_action.clone()
        by_action[on_device(lasts, device)] += numbers[on_device(having, device)].to(by_action.dtype)
        return replace(self, by_action=by_action)
