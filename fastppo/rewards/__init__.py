"""Reward functions: the runner that calls them safely, and a few ready ones."""

from fastppo.rewards.exact_answer import exact_answer
from fastppo.rewards.gsm8k import gsm8k
from fastppo.rewards.result import RewardResult
from fastppo.rewards.runner import RewardRunner
from fastppo.rewards.stories import happy_ending

__all__ = ["RewardResult", "RewardRunner", "exact_answer", "gsm8k", "happy_ending"]
