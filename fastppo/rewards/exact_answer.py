"""Is the final answer, as written, the expected one?"""

from __future__ import annotations

import re
from typing import Any

from fastppo.rewards.text import final_answer, text_of


def exact_answer(completions: list, answer: list, **columns: Any) -> list[float | None]:
    r"""1.0 where the completion's final answer equals column `answer`, else 0.0 (also where it gives none).

    The final answer stands after the last `####`, in the last `\boxed{}` or in `<answer>` tags; an `answer` that has such a mark is
    read the same way. Compared as text, after surrounding space, repeated spaces, separators of thousands and a trailing dot are gone.
    None (does not apply) where the row has no answer. TypeError for an answer that is neither a text nor a number.
    """
    return [_score(text_of(completion), gold) for completion, gold in zip(completions, answer, strict=True)]


def _score(text: str, gold: Any) -> float | None:
    if gold is None:
        return None
    found, expected = final_answer(text), as_text(gold)
    return float(found is not None and normalise(found) == normalise(final_answer(expected) or expected))


def as_text(gold: Any) -> str:
    if not isinstance(gold, str | int | float):
        raise TypeError(f"answer has a {type(gold).__name__}, expected a text or a number")
    whole = isinstance(gold, float) and gold.is_integer()  # how tables store a column of integers that has gaps
    return str(int(gold) if whole else gold)


def normalise(answer: str) -> str:
    """`" 1,000  m. "` -> `"1000 m"`."""
    answer = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer)
    answer = re.sub(r"\s*,\s*", ",", answer)
    return re.sub(r"\s+", " ", answer).strip().removesuffix(".").rstrip()
