"""A penalty for saying the same thing again and again."""

from __future__ import annotations

import re
from typing import Any

from fastppo.rewards.text import text_of

# A word, one character of a script without spaces (Chinese, Japanese), or one mark: `!!!!` repeats itself too.
_PIECE = re.compile(r"[぀-ヿ㐀-鿿]|[^\W぀-ヿ㐀-鿿]+|[^\w\s]")


def repetition(completions: list, *, n: int = 3, **columns: Any) -> list[float]:
    """Minus the share of n-grams of words that repeat an earlier one: (distinct n-grams - n-grams) / n-grams, in (-1, 0].

    The share is seq-rep-n of Welleck et al. 2019 (arXiv:1908.04319). Case does not count. In a text of n words or fewer, the n-grams
    are as long as leaves two of them, so that "very very very" is found too; a text of one word, or none, gets 0.

    Raises ValueError for an `n` that is no integer >= 1.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n is {n!r}, expected an integer >= 1")
    return [_penalty(text_of(completion), n) for completion in completions]


def _penalty(text: str, n: int) -> float:
    pieces = _PIECE.findall(text.lower())
    if len(pieces) < 2:
        return 0.0
    length = min(n, len(pieces) - 1)
    grams = list(zip(*(pieces[start:] for start in range(length)), strict=False))
    return (len(set(grams)) - len(grams)) / len(grams)
