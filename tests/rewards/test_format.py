"""Tags: in order, once each, around something."""

from __future__ import annotations

import pytest

from fastppo.rewards import think_answer_format, think_format


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>1+1</think>2", 1.0),
        ("  <think>\n1+1\n</think>\n\nIt is 2.", 1.0),
        ("<think>1+1</think><answer>2</answer>", 1.0),
        ("", 0.0),
        ("2", 0.0),
        ("<think></think>2", 0.0),
        ("<think> </think>2", 0.0),
        ("<think>1+1</think>  ", 0.0),
        ("<think>1+1", 0.0),
        ("1+1</think>2", 0.0),
        ("so: <think>1+1</think>2", 0.0),
        ("<think>1</think>2<think>3</think>4", 0.0),
        ("<think><think>1</think>2", 0.0),
        ("</think>1<think>2", 0.0),
    ],
)
def test_think_format(text, score):
    assert think_format([text]) == [score]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>1+1</think><answer>2</answer>", 1.0),
        ("<think>1+1</think>\n<answer>\n2\n</answer>\n", 1.0),
        ("<think>1+1</think>2", 0.0),
        ("<think>1+1</think>so <answer>2</answer>", 0.0),
        ("<think>1+1</think><answer>2</answer>!", 0.0),
        ("<think>1+1</think><answer></answer>", 0.0),
        ("<answer>2</answer><think>1+1</think>", 0.0),
        ("<think>1<answer>2</answer></think>", 0.0),
        ("", 0.0),
    ],
)
def test_think_answer_format(text, score):
    assert think_answer_format([text]) == [score]


def test_a_tag_that_the_prompt_has_opened():
    assert think_format(["1+1</think>2", "<think>1+1</think>2", ""], opened=True) == [1.0, 0.0, 0.0]
    assert think_answer_format(["1+1</think><answer>2</answer>"], opened=True) == [1.0]


def test_conversations():
    assert think_format([[{"role": "assistant", "content": "<think>1</think>2"}]]) == [1.0]
