"""How a step's records become learning: which of them an algorithm needs, what it makes of the scores, and how it updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from fastppo.evaluation import Evaluation
from fastppo.learner import Learner
from fastppo.plan import Plan
from fastppo.rewards.scores import Scores
from fastppo.rollout.rollout import Rollout
from fastppo.targets import Targets


class Algorithm(Protocol):
    needs: frozenset[str]
    """Of "logprobs", "values", "final_values" and "reference", what `Roles.evaluate` is asked for; and "greedy_scores", which
    `Scores.baselines` are then."""

    def credit(self, rollout: Rollout, evaluation: Evaluation, scores: Scores) -> Targets:
        """From scores to what each action is to learn."""
        ...

    def update(
        self,
        learner: Learner,
        rollout: Rollout,
        evaluation: Evaluation,
        targets: Targets,
        plan: Plan,
        progress: Callable[[int, int], None] | None = None,
        critic_plan: Plan | None = None,
    ) -> dict[str, float]:
        """Change the weights and return metrics; `progress` is told of (minibatches done, all of them). The critic learns by its own plan
        where there is one."""
        ...

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint must hold of the algorithm itself."""
        ...

    def load_state_dict(self, state: Mapping[str, float]) -> None: ...
