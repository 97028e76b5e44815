"""fastppo: a PPO engine for language models."""

from importlib.metadata import version

__version__ = version("fastppo")
