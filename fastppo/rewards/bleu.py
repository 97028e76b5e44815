"""How near is a completion to reference texts: sentence-level BLEU and chrF, by sacrebleu."""

from __future__ import annotations

import functools
from typing import Any

from fastppo.rewards.text import text_of


def bleu(completions: list, references: list, *, tokenize: str = "13a", **columns: Any) -> list[float | None]:
    """Sentence-level BLEU in [0, 1] against column `references`: a text or a list of texts for each row; None where it has none.

    BLEU-4 (Papineni et al. 2002) with the exponential smoothing of n-gram orders without a match and the effective order of short
    sentences, as sacrebleu's `sentence_bleu` has it (Post 2018, arXiv:1804.08771).

    Args:
        tokenize: sacrebleu's tokenizer: `13a`, `intl`, `char`, `zh`, ...

    Raises ImportError where sacrebleu is missing, ValueError for a tokenizer that it does not have, TypeError for references of another kind.
    """
    return _scores(_bleu(tokenize), completions, references)


def chrf(completions: list, references: list, *, word_order: int = 0, **columns: Any) -> list[float | None]:
    """Sentence-level chrF in [0, 1] (Popović 2015): the F-score, beta = 2, of character n-grams up to 6. References as for `bleu`.

    Args:
        word_order: longest n-gram of words that counts too; 2 is chrF++ (Popović 2017).

    Raises ImportError where sacrebleu is missing, ValueError for a `word_order` that is no integer >= 0, TypeError as `bleu`.
    """
    if isinstance(word_order, bool) or not isinstance(word_order, int) or word_order < 0:
        raise ValueError(f"word_order is {word_order!r}, expected an integer >= 0")
    return _scores(_chrf(word_order), completions, references)


def _scores(metric: Any, completions: list, references: list) -> list[float | None]:
    several = [_as_list(value, row) for row, value in enumerate(references)]
    return [
        min(1.0, metric.sentence_score(text_of(completion), texts).score / 100) if texts else None
        for completion, texts in zip(completions, several, strict=True)
    ]


def _as_list(value: Any, row: int) -> list[str]:
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"references[{row}] is {value!r}, expected a text, a list of texts or None")
    return list(texts)


@functools.cache
def _bleu(tokenize: str) -> Any:
    metrics = _metrics()
    if tokenize not in metrics.BLEU.TOKENIZERS:
        raise ValueError(f"tokenize is {tokenize!r}, expected one of {', '.join(sorted(metrics.BLEU.TOKENIZERS))}")
    return metrics.BLEU(tokenize=tokenize, effective_order=True)


@functools.cache
def _chrf(word_order: int) -> Any:
    return _metrics().CHRF(word_order=word_order)


def _metrics() -> Any:
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise ImportError("the bleu and chrf rewards need sacrebleu: pip install fastppo[bleu]") from error
    return metrics
