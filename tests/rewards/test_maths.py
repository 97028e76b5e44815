"""`gsm8k` and `maths` on GSM8K's own solutions, and on what models write around, instead of and against an answer."""

from __future__ import annotations

import builtins
import gzip
import json
import sys
import threading
import time

import pytest

from fastppo.rewards import RewardRunner, gsm8k, maths

GOLD = "24 + 48 = <<24+48=72>>72 clips.\n#### 72"


@pytest.mark.parametrize(
    "text",
    [
        "#### 72",
        "so 48 + 24 = 72.\n#### 72 clips",
        r"Therefore \boxed{72}.",
        r"\boxed{72 \text{ clips}}",
        r"#### \$72.00",
        "<answer>**72**</answer>",
        "#### 48 + 24 = 72",
        "She sold 48 + 24 = 72 clips.",
        "The answer is: 72!",
        "it is 10, no: 72%",
    ],
)
def test_right(text):
    assert gsm8k([text], [GOLD]) == [1.0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "seventy-two",
        "#### 73",
        "#### -72",
        "#### 7.2",
        "72 clips, so\n#### 27",
        "#### 48 + 24",  # the arithmetic is what is being learnt
        r"\boxed{\frac{144}{2}}",
        "#### 72 73",
        "#### 71 or 72",
        "72 of them and 3 left",
        "#### " + "72" * 40,
    ],
)
def test_wrong(text):
    assert gsm8k([text], [GOLD]) == [0.0]


HOSTILE = [
    "#### 9**9**9**9",
    r"\boxed{9^{9^{9^{9}}}}",
    r"\boxed{10^{-(9^9)}}",
    "#### 99999999!",
    r"\boxed{((9!)!)!}",
    r"\boxed{2^{99999999}}",
    r"\boxed{\exp(99999999999)}",
    r"\boxed{\sum_{i=1}^{10^{12}} i}",
    r"\boxed{\binom{99999999}{50000000}}",
    "#### __import__('os').system('true')",
    "9" * 100_000,
    "1+" * 50_000,
    "(" * 50_000 + "1" + ")" * 50_000,
    "\\boxed{" * 5_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:20])
@pytest.mark.parametrize(("reward", "gold"), [(gsm8k, GOLD), (maths, "72")], ids=["gsm8k", "maths"])
def test_nothing_a_model_writes_is_evaluated_for_long(reward, gold, text):
    """verl's CVE-2026-6878 was an eval() of model-written answers; a tower of powers would occupy the process for ever."""
    started = time.monotonic()
    assert reward([text], [gold]) == [0.0]
    assert time.monotonic() - started < 10


def test_large_and_negative_numbers():
    golds = ["#### 1,450,000", "#### -3", "#### 0"]
    assert gsm8k(["#### 1450000", "#### -3", "so 0"], golds) == [1.0, 1.0, 1.0]
    assert gsm8k(["#### 1,450", "#### 3", "#### 00"], golds) == [0.0, 0.0, 1.0]


def test_real_solutions(gsm8k_train):
    with gzip.open(gsm8k_train, "rt") as file:
        answers = [json.loads(line)["answer"] for line in file][::25]
    assert set(gsm8k(answers, answers)) == {1.0}
    shifted = gsm8k(answers, answers[1:] + answers[:1])
    assert sum(shifted) < 0.1 * len(shifted)


def test_a_column_in_another_format_is_an_error():
    with pytest.raises(ValueError, match=r"answer\[1\] is '72', expected GSM8K's format"):
        gsm8k(["#### 72"] * 2, [GOLD, "72"])


def test_in_a_process_and_in_a_thread():
    results = []

    def work():
        for timeout in (60.0, None):
            with RewardRunner(gsm8k, timeout=timeout) as runner:
                results.append(runner(["q"] * 2, ["#### 72", "#### 1"], {"answer": [GOLD] * 2}))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [result.scores for result in results] == [[1.0, 0.0]] * 2


@pytest.fixture
def no_math_verify(monkeypatch):
    real_import = builtins.__import__

    def refuse(name, *rest):
        if name.startswith("math_verify"):
            raise ImportError(name)
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_gsm8k_decides_without_math_verify(no_math_verify):
    assert gsm8k(["#### 72", "#### 1,072.0"], [GOLD, "#### 1072"]) == [1.0, 1.0]


def test_maths_without_math_verify_is_named_when_the_runner_is_made(no_math_verify):
    with pytest.raises(ImportError, match=r"maths.* needs? .*pip install fastppo\[math\]"):
        RewardRunner(maths, timeout=None)


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{0.5}", r"\frac12", 1.0),
        (r"\boxed{y^2+x^2}", "x^2+y^2", 1.0),
        (r"\boxed{\{2,1\}}", r"\{1,2\}", 1.0),
        (r"\boxed{\sqrt{8}}", r"2\sqrt2", 1.0),
        (r"\boxed{e^{x^2}}", r"e^{x^2}", 1.0),
        (r"\boxed{2^{10}}", "1024", 1.0),
        ("#### 1/2", 0.5, 1.0),
        ("it is 5, so 6", 6, 1.0),
        ("<answer>1,000.0</answer>", r"we get \boxed{1000}", 1.0),
        (r"\boxed{\frac{1}{3}}", "0.5", 0.0),
        (r"\boxed{(1,2)}", "[1,2]", 0.0),
        ("no idea", "5", 0.0),
        ("", "5", 0.0),
        ("#### 5", None, None),
        ("#### 5", "", None),
    ],
)
def test_maths(text, answer, score):
    assert maths([text], [answer]) == [score]


@pytest.mark.parametrize(
    ("text", "answer"), [("72", "72.0"), ("1,000", "1000"), ("$5", "5."), ("-3", "-3.00"), ("7", "8")]
)
def test_plain_numbers_are_decided_without_math_verify(monkeypatch, text, answer):
    monkeypatch.setattr(sys.modules[maths.__module__], "_verified", lambda *_: pytest.fail("asked math-verify"))
    assert maths([f"#### {text}"], [answer]) == [float(answer != "8")]


def test_maths_has_a_time_limit_in_the_process_of_a_reward(make):
    slow = r"\boxed{x=" + "(" * 120 + "1" + ")" * 120 + "}"
    result = make(maths, 30.0, retries=0)(["q"] * 2, [slow, "#### 2"], {"answer": ["2"] * 2})
    assert result.scores == [0.0, 1.0] and result.errors == []


def test_an_answer_that_is_no_text_is_an_error():
    with pytest.raises(TypeError, match="answer has a list"):
        maths(["#### 1"], [[1]])
