"""Problems of reasoning-gym with more than one try."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastppo.envs.environment import Observation
from fastppo.envs.tools import TextMaker
from fastppo.rewards.reasoning_gym import reasoning_gym

COLUMNS = ("question", "answer", "metadata", "task", "task_arguments")
WRONG = "\nThat is not right. Try again.\n"


class ReasoningGym(TextMaker):
    """Makes environments in which the policy answers a problem, is told when it is wrong, and may try again. The problems are the rows of the data
    `reasoning_gym:TASK`.

    A turn is paid what it adds to the best score so far, by the task's verifier (`fastppo.rewards.reasoning_gym`), so an episode earns the score of
    its best answer. It ends with the score 1 or with the last try.

    Args:
        attempts: tries that an episode has; `environment.max_turns` is a limit too. wrong: what the policy reads before it tries again.

    Raises:
        ValueError: attempts below 1. ImportError: reasoning-gym is missing.
    """

    def __init__(self, attempts: int = 1, wrong: str = WRONG) -> None:
        if isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 1:
            raise ValueError(f"attempts is {attempts!r}, expected a whole number >= 1")
        reasoning_gym([], [], [], [], [], [])  # asks for the library
        self._attempts, self._wrong, self.answers = attempts, wrong, attempts > 1

    def __call__(self) -> ReasoningGymEnvironment:
        return ReasoningGymEnvironment(self._attempts, self._wrong)


class ReasoningGymEnvironment:
    """One problem at a time."""

    def __init__(self, attempts: int, wrong: str) -> None:
        self._attempts, self._wrong = attempts, wrong

    def reset(self, row: Mapping[str, Any]) -> Observation:
        missing = [name for name in COLUMNS if name not in row]
        if missing:
            raise ValueError(
                f"the row has no {', '.join(missing)}, expected the columns of the data reasoning_gym:TASK"
            )
        self._entry = {name: [row[name]] for name in COLUMNS}
        self._left, self._best = self._attempts, 0.0
        return None

    def step(self, completion: str) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        (score,) = reasoning_gym([completion], **self._entry)
        if math.isnan(score):
            raise ValueError(f"the verifier of {self._entry['task'][0]} raised at {completion!r}")
        self._left -= 1
        gain = max(score - self._best, 0.0)
        self._best += gain
        over = score >= 1 or self._left == 0
        return None if over else self._wrong, gain, over, False, {"score": score}
