"""Rollouts: completions sampled from the very model that trains, in the packed batch format of everything that follows."""

from fastppo.rollout.engine import Engine
from fastppo.rollout.generation import GenerationStats
from fastppo.rollout.rollout import FinishReason, Rollout
from fastppo.rollout.sampling import SamplingParams

__all__ = ["Engine", "FinishReason", "GenerationStats", "Rollout", "SamplingParams"]
