"""Grade-school mathematics (Cobbe et al. 2021, arXiv:2110.14168): is the number right?"""

from __future__ import annotations

import re
import threading
from typing import Any

from fastppo.rewards.text import final_answer, text_of

MAX_NUMBER_CHARACTERS = 64

_NUMBER = re.compile(r"-?\s?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_DRESSING = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|quad)(?![a-z])|\\[%$,;:! ()\[\]]|[$%!*{}]")


def gsm8k(completions: list, answer: list, **columns: Any) -> list[float]:
    r"""1.0 where the completion's answer is the number that column `answer` gives after `####`, else 0.0.

    The completion's answer stands after the last `####`, in the last `\boxed{}` or in `<answer>` tags; without such a mark it is the
    last number in the text. math-verify compares, so that `1,000`, `1000.00` and `\$1000` are equal. One number is expected: a sum left
    undone (`48 + 24`) is wrong, and nothing else that a model may write is ever evaluated.

    Raises:
        ImportError: math-verify is missing. ValueError: an `answer` is not in GSM8K's format.
    """
    golds = [_gold(text, row) for row, text in enumerate(answer)]
    return [_score(text_of(completion), gold) for completion, gold in zip(completions, golds, strict=True)]


def _gold(answer: Any, row: int) -> str:
    gold = final_answer(answer) if isinstance(answer, str) else None
    number = gold and plain_number(gold)
    if not number:
        raise ValueError(f"answer[{row}] is {answer!r}, expected GSM8K's format: a solution that ends in '#### 72'")
    return number


def _score(text: str, gold: str) -> float:
    found = final_answer(text)
    if found is None:
        numbers = _NUMBER.findall(text)
        found = numbers[-1] if numbers else ""
    number = plain_number(found)
    return float(number is not None and _equal(gold, number))


def plain_number(answer: str) -> str | None:
    r"""The one number in `48 + 24 = \$72 \text{ clips}` ("72"); None where there is none, or more than one after the last `=`."""
    if len(answer) > MAX_NUMBER_CHARACTERS:
        return None
    answer = _DRESSING.sub("", answer.rsplit("=", 1)[-1])
    numbers = _NUMBER.findall(answer)
    if len(numbers) != 1 or "\\" in answer:
        return None
    return re.sub(r"[\s,]", "", numbers[0])


def _equal(gold: str, number: str) -> bool:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError("the gsm8k reward needs math-verify: pip install fastppo[math]") from error
    # Its time limit uses a signal, which only the main thread may set. One number cannot take long.
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    return bool(verify(parse(gold, parsing_timeout=limit), parse(number, parsing_timeout=limit), timeout_seconds=limit))
