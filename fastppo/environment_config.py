"""Settings of episodes with an environment."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass


@dataclass(config=ConfigDict(extra="forbid"))
class EnvironmentConfig:
    """How episodes with an environment are played; without one these settings do nothing."""

    max_turns: Annotated[int, Field(ge=1)] = 8
    """Most turns of an episode; one that reaches them is truncated, not terminated."""
    max_tokens: Annotated[int, Field(ge=2)] | None = None
    """Most tokens of an episode: prompt, turns and what the environment says between them. One that has no room for an observation and a token
    after it is truncated. Of a debate, most tokens of a seat. By default the model's context."""
    call_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    """Seconds that one call of an environment may take; then its episode is invalid and the others go on."""
    episode_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600.0
    """Seconds that a program (`fastppo.envs.AgentProgram`) may take for an episode, the policy's answers included; then that is invalid."""
    concurrent: Annotated[int, Field(ge=1)] = 64
    """Environments that are open side by side, each with a thread of its own; further episodes begin as others end."""
