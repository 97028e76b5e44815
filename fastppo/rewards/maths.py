"""Mathematics: is the final answer the right number, or equal to the right expression?"""

from __future__ import annotations

import functools
import re
import threading
from decimal import Decimal
from typing import Any

from fastppo.rewards.exact_answer import as_text, normalise
from fastppo.rewards.text import final_answer, text_of

MAX_NUMBER_CHARACTERS = 64
MAX_EXPRESSION_CHARACTERS = 300
PARSE_SECONDS = 2

_NUMBER = re.compile(r"-?\s?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_DRESSING = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|quad)(?![a-z])|\\[%$,;:! ()\[\]]|[$%!*{}]")
_PLAIN = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?")
# What SymPy would work out on sight, in one call that no time limit interrupts: towers of powers, factorials of factorials, large exponents.
_POWER = r"(?:\^|\*\*)\s*[{(]*\s*-?\s*"
_TOO_LARGE = re.compile(
    rf"{_POWER}\d+\s*[)}}]*\s*{_POWER}\d|{_POWER}\d{{5,}}|\d{{5,}}\s*!|!\s*[)}}]*\s*!|\\binom\s*\{{\s*\d{{5,}}|\\(?:sum|prod)(?![a-z])"
)


def gsm8k(completions: list, answer: list, **columns: Any) -> list[float]:
    r"""1.0 where the completion's answer is the number that column `answer` gives after `####`, else 0.0 (GSM8K, Cobbe et al. 2021,
    arXiv:2110.14168).

    The completion's answer stands after the last `####`, in the last `\boxed{}` or in `<answer>` tags; without such a mark it is the
    last number in the text. Numbers are compared by value: `1,000`, `1000.00` and `\$1000` are equal. One number is expected: a sum left
    undone (`48 + 24`) is wrong, and nothing that a model may write is ever evaluated.

    Raises ValueError for an `answer` that is not in GSM8K's format.
    """
    golds = [_gold_number(text, row) for row, text in enumerate(answer)]
    return [
        float(_number_given(text_of(completion)) == gold) for completion, gold in zip(completions, golds, strict=True)
    ]


def maths(completions: list, answer: list, **columns: Any) -> list[float | None]:
    r"""1.0 where the completion's final answer equals column `answer` as mathematics, else 0.0 (also where it gives none).

    The final answer is found as for `gsm8k`; an `answer` that has such a mark (a whole solution) is read the same way. Equal texts and plain
    numbers are decided at once; for all else (`\frac{1}{2}` and `0.5`, sets, intervals, equations) math-verify parses both, for `PARSE_SECONDS`
    each at most where this is the process's main thread. An answer of more than `MAX_EXPRESSION_CHARACTERS`, or with a power or product that would
    take for ever to work out, is wrong. None (does not apply) where the row has no answer, or one that math-verify cannot read.

    Raises ImportError where math-verify is missing, TypeError for an answer that is neither a text nor a number.
    """
    _math_verify()
    return [_maths_score(text_of(completion), gold) for completion, gold in zip(completions, answer, strict=True)]


def plain_number(answer: str) -> str | None:
    r"""The one number in `48 + 24 = \$72 \text{ clips}` ("72"); None where there is none, or more than one after the last `=`."""
    if len(answer) > MAX_NUMBER_CHARACTERS:
        return None
    answer = _DRESSING.sub("", answer.rsplit("=", 1)[-1])
    numbers = _NUMBER.findall(answer)
    if len(numbers) != 1 or "\\" in answer:
        return None
    return re.sub(r"[\s,]", "", numbers[0])


def _gold_number(answer: Any, row: int) -> Decimal:
    gold = final_answer(answer) if isinstance(answer, str) else None
    number = gold and plain_number(gold)
    if not number:
        raise ValueError(f"answer[{row}] is {answer!r}, expected GSM8K's format: a solution that ends in '#### 72'")
    return Decimal(number)


def _number_given(text: str) -> Decimal | None:
    number = plain_number(_found(text))
    return None if number is None else Decimal(number)


def _found(text: str) -> str:
    """The final answer, or the last number where nothing marks one; "" where there is neither."""
    marked = final_answer(text)
    if marked is not None:
        return marked
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else ""


def _maths_score(text: str, gold: Any) -> float | None:
    if gold is None:
        return None
    expected = as_text(gold)
    expected = final_answer(expected) or expected
    found = _found(text)
    if normalise(found) == normalise(expected):
        return 1.0
    numbers = _as_number(found), _as_number(expected)
    if None not in numbers:
        return float(numbers[0] == numbers[1])
    return _verified(found, expected)


def _as_number(answer: str) -> Decimal | None:
    r"""Of a text that is a number and nothing else, but for dollars around it and a dot behind."""
    answer = answer.strip(" $.") if answer.endswith(".") else answer.strip(" $")
    if len(answer) > MAX_NUMBER_CHARACTERS or not any(map(str.isdigit, answer)) or not _PLAIN.fullmatch(answer):
        return None
    return Decimal(answer.replace(",", ""))


def _verified(found: str, expected: str) -> float | None:
    _, verify = _math_verify()
    gold = _parsed(expected)
    if not gold:
        return None
    if not found or len(found) > MAX_EXPRESSION_CHARACTERS or _TOO_LARGE.search(found):
        return 0.0
    return float(verify(gold, _parsed(found), timeout_seconds=_limit()))


@functools.lru_cache(maxsize=1024)  # a prompt's samples share their gold answer
def _parsed(answer: str) -> list[Any]:
    parse, _ = _math_verify()
    text = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
    return parse(text, parsing_timeout=_limit())


def _limit() -> int | None:
    """math-verify's time limit uses a signal, which only the main thread may set."""
    return PARSE_SECONDS if threading.current_thread() is threading.main_thread() else None


def _math_verify() -> tuple[Any, Any]:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError("the maths reward needs math-verify: pip install fastppo[math]") from error
    return parse, verify
