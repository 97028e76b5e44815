"""A policy that says what a test wants it to, and one that says anything."""

from __future__ import annotations

from fastppo.rollout import Engine
from tests.envs.chat import make_chat_tokenizer
from tests.rollout.tiny import make_chain
from tests.tiny import make_model

CALLS = {
    "start_anchor": "assistant\n",
    "fields": {
        "tool_calls": {
            "open": "[",
            "close": "]",
            "repeats": True,
            "content": "text",
            "transform": {"type": "function", "function": {"name": "look", "arguments": {"where": "{content}"}}},
        },
        "content": {"content": "text"},
    },
}
"""`[up]` calls look(where="up")."""


def make_random_engine(**changes) -> Engine:
    tokenizer = make_chat_tokenizer()
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=512, eos_token_id=None)
    return Engine(model, tokenizer, **{"max_batch_size": 8} | changes)


def make_saying_engine(text: str) -> Engine:
    """Of a policy whose likeliest answer is `text`, which has no character twice."""
    tokenizer = make_chat_tokenizer()
    tokenizer.response_template = CALLS
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ["\n", *text, "<|im_end|>"]]
    successors = list(range(len(tokenizer)))
    for before, after in zip(ids, ids[1:], strict=False):
        successors[before] = after
    model = make_chain(successors, gap=60.0)
    model.config.max_position_embeddings = 1024
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return Engine(model, tokenizer, max_batch_size=8)
