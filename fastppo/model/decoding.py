"""Token ids as text, also where the model can draw ids for which the tokenizer has no token.

The output layer of many models has more rows than their tokenizer has tokens. Tokenizers in Rust leave such ids out of the text; those in
Python raise what they like. Here both leave them out.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    """The text of token ids. Ids that the tokenizer cannot decode count for nothing."""
    try:
        return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    except Exception:  # ValueError, TypeError, IndexError, ...: each tokenizer has its own
        known = decodable(tokenizer, ids)
        if len(known) == len(ids):
            raise
        return tokenizer.decode(known, skip_special_tokens=skip_special_tokens)


def decodable(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """Those of the ids that the tokenizer can decode."""
    return [token for token in ids if _can_decode(tokenizer, token)]


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as the tokenizer writes it, for people to read."""
    return decode(tokenizer, [token], skip_special_tokens=False) or "a token without text"


def _can_decode(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    try:
        tokenizer.decode([token])
    except Exception:
        return False
    return True
