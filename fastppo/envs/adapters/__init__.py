"""Environments of other libraries, each by its maker: `PPOTrainer(environment=TextArena("GuessTheNumber-v0"))`."""

from fastppo.envs.adapters.gymnasium import Gymnasium
from fastppo.envs.adapters.mcp import MCP
from fastppo.envs.adapters.openenv import OpenEnv
from fastppo.envs.adapters.reasoning_gym import ReasoningGym
from fastppo.envs.adapters.textarena import TextArena
from fastppo.envs.adapters.verifiers import Verifiers

READY_ENVIRONMENTS = {
    "gymnasium": Gymnasium,
    "mcp": MCP,
    "openenv": OpenEnv,
    "reasoning_gym": ReasoningGym,
    "textarena": TextArena,
    "verifiers": Verifiers,
}
"""By the names that recipes know them by; called with `environment.arguments`, each is what makes the environments."""

__all__ = ["MCP", "READY_ENVIRONMENTS", "Gymnasium", "OpenEnv", "ReasoningGym", "TextArena", "Verifiers"]
