"""`exact_answer` and the reading of final answers."""

from __future__ import annotations

import datetime

import pytest

from fastppo.rewards import exact_answer
from fastppo.rewards.text import final_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It is 3.\n#### 72", "72"),
        ("#### 1\nNo:\n#### 72\nDone.", "72"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed{5} or rather \boxed {6}", "6"),
        ("<think>4</think><answer> 72 </answer> bye", "72"),
        ("<answer>72", "72"),
        (r"<answer>\boxed{72}</answer>", "72"),
        ("<answer>#### 72</answer>", "72"),
        (r"#### 5, \boxed{6", "5, \\boxed{6"),
        ("####", ""),
        ("The answer is 72.", None),
        (r"\boxed{7", None),
        ("", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("#### 72", "72", 1.0),
        ("#### 72.", 72, 1.0),
        ("#### 72", 72.0, 1.0),
        ("#### 1,000,000", "1000000", 1.0),
        ("<answer>  a   cat </answer>", "a cat", 1.0),
        (r"\boxed{(1, 2)}", "(1,2)", 1.0),
        ("#### 72", "so 24 + 48\n#### 72", 1.0),
        ("#### 1,2", "12", 0.0),
        ("#### 7", "72", 0.0),
        ("72", "72", 0.0),
        ("#### __import__('os')", "72", 0.0),
        ("#### 72", None, None),
    ],
)
def test_scores(text, answer, score):
    assert exact_answer([text], [answer]) == [score]


def test_conversations():
    assert exact_answer([[{"role": "assistant", "content": "#### 72"}]], answer=["72"]) == [1.0]


def test_an_answer_that_became_a_date_is_an_error():
    with pytest.raises(TypeError, match="answer has a datetime"):
        exact_answer(["#### 2020-01-01"], answer=[datetime.datetime(2020, 1, 1)])
