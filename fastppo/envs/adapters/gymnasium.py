"""Gymnasium's environments whose observations are texts, and whose actions are texts or numbered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastppo.envs.adapters.optional import imported
from fastppo.envs.environment import Observation, after_prompt
from fastppo.envs.tools import TextMaker


class Gymnasium(TextMaker):
    """Makes environments of Gymnasium: `Gymnasium("FrozenLake-v1", render_mode="ansi")`.

    The policy reads the row's prompt, which says what the game is, and after it the first observation, on a line of its own: a text where the
    observation space is `Text`, else what an environment of the render mode "ansi" renders. It answers with an action: its text, where the action
    space is `Text`, or its number, where that is `Discrete`. An answer that is none is told so, pays nothing and does not reach the environment.

    Args:
        id: what `gymnasium.make` makes. arguments: of `gymnasium.make`.

    Raises:
        ImportError: Gymnasium is missing. ValueError: it makes no environment of this, or one with other spaces.
    """

    def __init__(self, id: str, **arguments: Any) -> None:
        self._library = imported("gymnasium", "gymnasium")
        self._id, self._arguments = id, arguments
        self().close()

    def __call__(self) -> GymnasiumEnvironment:
        try:
            made = self._library.make(self._id, **self._arguments)
        except (self._library.error.Error, TypeError, ImportError) as error:
            raise ValueError(f"gymnasium.make makes nothing of {self._id!r}, {self._arguments}: {error}") from error
        return GymnasiumEnvironment(made, self._library.spaces)


class GymnasiumEnvironment:
    """One that is open."""

    def __init__(self, env: Any, spaces: Any) -> None:
        self._env, self._is_number = env, isinstance(env.action_space, spaces.Discrete)
        self._renders = not isinstance(env.observation_space, spaces.Text)
        if self._renders and env.render_mode != "ansi":
            raise ValueError(
                f'its observations are {env.observation_space}, expected Text, or render_mode "ansi", which makes a text of them'
            )
        if not self._is_number and not isinstance(env.action_space, spaces.Text):
            raise ValueError(f"its actions are {env.action_space}, expected Text or Discrete")

    def reset(self, row: Mapping[str, Any], seed: int) -> Observation:
        observation, _ = self._env.reset(seed=seed, options=dict(row))
        return after_prompt(row["prompt"], f"\n{self._text(observation)}")

    def step(self, completion: str) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        action = self._action(completion.strip())
        if action is None or not self._env.action_space.contains(action):
            return (
                f"\n{completion.strip()!r} is no action, expected one of {self._env.action_space}\n",
                0.0,
                False,
                False,
                {},
            )
        observation, reward, terminated, truncated, info = self._env.step(action)
        return f"\n{self._text(observation)}", reward, terminated, truncated, info

    def close(self) -> None:
        self._env.close()

    def _text(self, observation: Any) -> str:
        return self._env.render() if self._renders else observation

    def _action(self, text: str) -> Any:
        """None for what is no number where it has to be one."""
        if not self._is_number:
            return text
        try:
            return int(text)
        except ValueError:
            return None
