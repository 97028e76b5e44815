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


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """[n] ids -> [n] texts, special tokens included, that make up the text of all when they are joined.

    A character whose bytes are several tokens belongs to the last of them. Each token is decoded after its predecessor, because many
    tokenizers drop the space of a token that begins a text.
    """
    texts: list[str] = []
    start, shown = 0, ""  # the tokens from `start` to here begin with the text `shown`, which has an owner
    for place in range(len(ids)):
        text = decode(tokenizer, ids[start : place + 1], skip_special_tokens=False)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and place + 1 < len(ids):
            texts.append("")
            continue
        texts.append(text[len(shown) :])
        start, shown = place, decode(tokenizer, ids[place : place + 1], skip_special_tokens=False)
    return texts
