"""The one way from a prompt's text to token ids."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, *, rendered: bool = False) -> list[int]:
    """Token ids of a text that a model is to go on with: with the special tokens that the tokenizer puts before texts, and without
    the end of sequence that some put after them, which would tell the model that all is said. One that the text itself ends with stays.

    Args:
        rendered: the text has its special tokens already, as a chat template writes them: none is added.
    """
    ids = _encode(tokenizer, text, special=not rendered)
    end = tokenizer.eos_token_id
    if rendered or end is None or len(ids) < 2 or ids[-1] != end:
        return ids
    own = _ends(_encode(tokenizer, text, special=False), end)
    return ids[: len(ids) - min(_ends(ids, end) - own, len(ids) - 1)]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=special, padding=False, truncation=False, verbose=False)["input_ids"]


def _ends(ids: list[int], end: int) -> int:
    """How many of the last ids are `end`."""
    count = 0
    while count < len(ids) and ids[-1 - count] == end:
        count += 1
    return count
