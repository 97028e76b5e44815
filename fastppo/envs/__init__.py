"""Environments: episodes of several turns with what answers the policy, pays it and says when it is over."""

from fastppo.debate_config import Debate, Speech
from fastppo.envs.calculator import calculator
from fastppo.envs.debate import hold_debates
from fastppo.envs.dialogue import Dialogue
from fastppo.envs.environment import Environment, Observation
from fastppo.envs.episodes import Episode, EpisodePlayer, Played, PlayedTurn
from fastppo.envs.program import AgentProgram
from fastppo.envs.sandbox import PythonSandbox, python
from fastppo.envs.tools import Tools

READY_TOOLS = {tool.__name__: tool for tool in (calculator, python)}
"""By the names that recipes know them by."""

__all__ = [
    "AgentProgram",
    "Debate",
    "Dialogue",
    "Environment",
    "Episode",
    "EpisodePlayer",
    "Observation",
    "Played",
    "PlayedTurn",
    "PythonSandbox",
    "Speech",
]
__all__ += ["READY_TOOLS", "Tools", "calculator", "hold_debates", "python"]
