"""Reward functions: the runner that calls them safely, and ready ones, which recipes name by their short names."""

from fastppo.rewards.bleu import bleu, chrf
from fastppo.rewards.exact_answer import exact_answer
from fastppo.rewards.format import think_answer_format, think_format
from fastppo.rewards.http import http
from fastppo.rewards.length import soft_overlong
from fastppo.rewards.maths import gsm8k, maths
from fastppo.rewards.pattern import json_schema, regex
from fastppo.rewards.reasoning_gym import reasoning_gym
from fastppo.rewards.repetition import repetition
from fastppo.rewards.result import RewardResult
from fastppo.rewards.reward_model import RewardModel
from fastppo.rewards.runner import RewardRunner
from fastppo.rewards.stories import happy_ending
from fastppo.rewards.weighted import WeightedReward

READY = {
    "bleu": bleu,
    "chrf": chrf,
    "exact_answer": exact_answer,
    "gsm8k": gsm8k,
    "happy_ending": happy_ending,
    "http": http,
    "json_schema": json_schema,
    "maths": maths,
    "reasoning_gym": reasoning_gym,
    "regex": regex,
    "repetition": repetition,
    "reward_model": RewardModel,
    "soft_overlong": soft_overlong,
    "think_answer_format": think_answer_format,
    "think_format": think_format,
}
"""The ready reward functions by their short names; a class is made with its arguments first."""

__all__ = [*(ready.__name__ for ready in READY.values()), "READY", "RewardResult", "RewardRunner", "WeightedReward"]
