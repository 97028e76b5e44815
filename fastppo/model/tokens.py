"""A prompt's text as token ids: one way for data sets and for the engine."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The text with the tokenizer's own special tokens, but for an end of sequence that it adds: that would end the prompt's answer."""
    ids = tokenizer(text, add_special_tokens=True, padding=False, truncation=False, verbose=False)["input_ids"]
    eos = tokenizer.eos_token_id
    added = eos is not None and len(ids) > 1 and ids[-1] == eos and not text.endswith(tokenizer.eos_token)
    return ids[:-1] if added else ids
