"""Environments that an OpenEnv server offers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastppo.envs.adapters.optional import imported
from fastppo.envs.environment import Observation, after_prompt
from fastppo.envs.tools import TextMaker


class OpenEnv(TextMaker):
    """Makes sessions of an OpenEnv server, each a WebSocket of its own: `OpenEnv("http://127.0.0.1:8000", action="message", observation="text")`.

    The policy reads the row's prompt, and after it, on a line of its own, the first observation; the server is given the seed and the row's columns
    that its `reset` takes. A session is opened at the first episode, kept for later ones, and closed at the end.

    Args:
        url: of the server. It has to allow as many sessions as `environment.concurrent`.
        action: the field of the environment's action that the policy's text is.
        observation: the field of its observation that the policy reads.

    Raises ImportError where openenv-core is missing.
    """

    def __init__(self, url: str, action: str, observation: str) -> None:
        self._client = imported("openenv.core.generic_client", "openenv").GenericEnvClient
        self._url, self._fields = url, (action, observation)

    def __call__(self) -> OpenEnvSession:
        return OpenEnvSession(self._client(base_url=self._url), *self._fields)


class OpenEnvSession:
    """One session."""

    def __init__(self, client: Any, action: str, observation: str) -> None:
        self._client, self._action, self._observation = client, action, observation

    async def reset(self, row: Mapping[str, Any], seed: int) -> Observation:
        result = await self._client.reset(**{**row, "seed": seed})
        said = self._read(result)
        return after_prompt(row["prompt"], f"\n{said}") if said else None

    async def step(self, completion: str) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        try:
            result = await self._client.step({self._action: completion})
        except RuntimeError as error:
            raise ValueError(
                f"the server refuses an action whose field {self._action!r} (action) is a text: {error}"
            ) from error
        reward = 0.0 if result.reward is None else float(result.reward)
        return f"\n{self._read(result)}\n", reward, result.done, False, {}

    async def close(self) -> None:
        await self._client.close()

    def _read(self, result: Any) -> str:
        if self._observation not in result.observation:
            fields = ", ".join(result.observation)
            raise ValueError(
                f"observation is {self._observation!r}, which the server's has not, expected one of {fields}"
            )
        return str(result.observation[self._observation])
