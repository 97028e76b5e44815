"""Is a completion laid out as asked: reasoning in `<think>` tags, then the answer?"""

from __future__ import annotations

import re
from typing import Any

from fastppo.rewards.text import text_of

_TAG = re.compile(r"</?(?:think|answer)>")


def think_format(completions: list, *, opened: bool = False, **columns: Any) -> list[float]:
    """1.0 where the completion is `<think>reasoning</think>` and an answer after it, else 0.0.

    Each tag stands there once, nothing but space comes before them, and neither reasoning nor answer is empty.

    Args:
        opened: the prompt has written the first `<think>` already, as some chat templates do.
    """
    return [float(_is_laid_out(text_of(c), ["<think>", "</think>"], opened)) for c in completions]


def think_answer_format(completions: list, *, opened: bool = False, **columns: Any) -> list[float]:
    """1.0 where the completion is `<think>reasoning</think><answer>answer</answer>` and nothing else but space, else 0.0.

    Each tag stands there once, and neither reasoning nor answer is empty (the format of DeepSeek-R1-Zero, arXiv:2501.12948).

    Args:
        opened: the prompt has written the first `<think>` already, as some chat templates do.
    """
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    return [float(_is_laid_out(text_of(c), tags, opened)) for c in completions]


def _is_laid_out(text: str, tags: list[str], opened: bool) -> bool:
    text = "<think>" + text if opened else text
    found = [tag for tag in _TAG.findall(text) if tag in tags]
    if found != tags:
        return False
    before, reasoning, *rest = (part.strip() for part in re.split("|".join(tags), text))
    if before or not reasoning:
        return False
    return bool(rest[0]) if len(tags) == 2 else bool(rest[1]) and not rest[0] and not rest[2]
