"""Transformers models as fastppo uses them: loaded, checked once, run packed, as trunk and head or, where they are built as Llama is, as parts."""

from fastppo.model.attention import run_trunk
from fastppo.model.critic import Critic, ValueHead, make_value_head
from fastppo.model.endings import ending_ids
from fastppo.model.exact import make_exact
from fastppo.model.histogram_head import Histogram, HistogramHead
from fastppo.model.loading import (
    load_model,
    load_named_tokenizer,
    load_outline,
    load_reward_model,
    load_tokenizer,
    resolve_device,
)
from fastppo.model.packed import LMHead, context_length, evaluating, lm_head, packed_hidden
from fastppo.model.prepare import prepare_model
from fastppo.model.shared_prompts import SharedPrompts
from fastppo.model.tokens import encode_answered, encode_prompt

__all__ = [
    "Critic",
    "Histogram",
    "HistogramHead",
    "LMHead",
    "SharedPrompts",
    "ValueHead",
    "context_length",
    "encode_answered",
    "encode_prompt",
    "ending_ids",
    "evaluating",
    "lm_head",
    "load_model",
    "load_named_tokenizer",
    "load_outline",
    "load_reward_model",
    "load_tokenizer",
    "make_exact",
    "make_value_head",
    "packed_hidden",
    "prepare_model",
    "resolve_device",
    "run_trunk",
]
