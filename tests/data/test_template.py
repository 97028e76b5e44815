"""`prompt_template`: columns in braces, and what else braces may stand for."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fastppo.data import load_prompts
from fastppo.recipe_config import DataConfig

ROW = {"question": "How much is 1+1?", "answer": "2", "final answer": "two", "n": 3}


def text_of(template, tokenizer, row=ROW):
    return load_prompts([row], tokenizer, DataConfig(prompt_template=template))[0]["prompt"]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{question}", "How much is 1+1?"),
        ("{{{answer}}} {question} {answer}", "{2} How much is 1+1? 2"),
        ("Say hi.", "Say hi."),
        ("{final answer}", "two"),
        (r"{question} End with \boxed{{}}.", r"How much is 1+1? End with \boxed{}."),
        (r"End with \boxed{{answer}}.", r"End with \boxed{answer}."),
        (r"Show \boxed{{{n}}}.", r"Show \boxed{3}."),
        (r"\alpha {n}", r"\alpha 3"),
        ('{question} As JSON: {{"answer": 1}}', 'How much is 1+1? As JSON: {"answer": 1}'),
        ("costs ${n}, 2^{n}, a_{n}", "costs $3, 2^3, a_3"),
    ],
)
def test_template(tokenizer, template, text):
    assert text_of(template, tokenizer) == text


def test_braces_in_the_data_are_left_alone(tokenizer):
    assert (
        text_of("{prompt}", tokenizer, {"prompt": r"{answer} {0.__class__} \boxed{n}"})
        == r"{answer} {0.__class__} \boxed{n}"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (0.5, "0.5"),
        (12345678901234567890123, "12345678901234567890123"),
        (np.int64(7), "7"),
        (np.float32(0.1), "0.1"),
    ],
)
def test_numbers_are_written_as_they_are(tokenizer, value, text):
    assert text_of("{x} plus 4", tokenizer, {"x": value}) == f"{text} plus 4"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, [1], {"a": 1}, b"x", np.float32("nan")])
def test_values_that_are_no_texts(tokenizer, value):
    with pytest.raises(ValueError, match="column 'x' of row 0 is .*, expected a text or a number"):
        text_of("{x} plus 4", tokenizer, {"x": value})


LITERAL_BRACES = [
    r"\boxed{}",
    '{"answer": 1}',
    "{'a': {}}",
    "f(x) = {x}",
    "{ }",
    "{0}",
    "{1,2}",
    "{a: b}",
    "{",
    "}",
    "{{}",
    "{}}",
    "{n",
    "a } b",
    r"\frac{1}{2}",
]


@pytest.mark.parametrize("literal", LITERAL_BRACES)
def test_braces_that_are_no_columns_are_refused_with_the_way_to_write_them(tokenizer, literal):
    with pytest.raises(ValueError, match=re.escape("braces that stand for themselves are doubled: {{ }}")):
        text_of("{question} " + literal, tokenizer)


@pytest.mark.parametrize("command", [r"\boxed", r"\text", r"\sqrt[3]", r"\operatorname*", r"\frac"])
def test_a_column_in_latex_braces_is_never_put_in_silently(tokenizer, command):
    """`\\boxed{answer}` put the gold answer into every prompt."""
    with pytest.raises(ValueError, match="into every prompt: write ") as error:
        text_of("{question} Write " + command + "{answer}.", tokenizer)
    for offered, text in ((command + "{{answer}}", command + "{answer}"), (command + "{{{answer}}}", command + "{2}")):
        assert offered in str(error.value) and text_of("Write " + offered, tokenizer) == "Write " + text


@pytest.mark.parametrize("template", ["{question} \boxed{{}}", "{question} \frac{{1}}{{2}}", "\vec", "\alpha"])
def test_backslashes_that_quotes_have_eaten(tokenizer, template):
    with pytest.raises(ValueError, match="control character .*: double the backslash"):
        text_of(template, tokenizer)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            "{prompt}",
            r"names the column 'prompt', expected one of the data's, without options: 'question', 'answer', 'final answer', 'n'",
        ),
        ("{qestion}", r"'qestion' \(did you mean {question}\?\)"),
        ("{question.__class__}", "names the column 'question.__class__'"),
        ("{question[0]}", r"names the column 'question\[0\]'"),
        ("{question!r}", "without options"),
        ("{question:>10}", "without options"),
        ("{}", "names the column ''"),
        ("{question", "prompt_template is '{question'"),
    ],
)
def test_wrong_templates(tokenizer, template, words):
    with pytest.raises(ValueError, match=words):
        text_of(template, tokenizer)
