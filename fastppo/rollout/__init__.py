"""Rollouts: completions sampled from the very model that trains, in the packed batch format of everything that follows."""

from fastppo.rollout.engine import Engine
from fastppo.rollout.rollout import FinishReason, Rollout
from fastppo.rollout.sampling import SamplingParams
from fastppo.rollout.sequences import Turn
from fastppo.rollout.session import Session
from fastppo.rollout.stats import GenerationStats

__all__ = ["Engine", "FinishReason", "GenerationStats", "Rollout", "SamplingParams", "Session", "Turn"]
