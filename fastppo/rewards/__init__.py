"""Reward functions: the runner that calls them safely, and a few ready ones."""

from fastppo.rewards.exact_answer import exact_answer
from fastppo.rewards.gsm8k import gsm8k
from fastppo.rewards.runner import RewardResult, RewardRunner
from fastppo.rewards.stories import happy_ending

__all__ = ["RewardResult", "RewardRunner", "exact_answer", "gsm8k", "happy_ending"]
