"""Prompts: reading data sets, making prompt texts and token ids of their rows, drawing them in a reproducible order.

A prompt is a text, or a conversation: a list of messages `{"role": ..., "content": ...}`.
"""

from fastppo.data.prompts import PROMPT_COLUMNS, PromptDataset, load_prompts, load_train_and_eval
from fastppo.data.sampler import PromptSampler
from fastppo.data.sources import Row

__all__ = ["PROMPT_COLUMNS", "PromptDataset", "PromptSampler", "Row", "load_prompts", "load_train_and_eval"]
