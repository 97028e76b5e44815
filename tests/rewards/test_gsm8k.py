"""`gsm8k` on GSM8K's own solutions and on what models write around, instead of and against a number."""

from __future__ import annotations

import builtins
import gzip
import json
import threading
import time

import pytest

from fastppo.rewards import RewardRunner, gsm8k

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


@pytest.mark.parametrize(
    "text",
    [
        "#### 9**9**9**9",
        r"\boxed{9^{9^{9^{9}}}}",
        "#### 99999999!",
        r"\boxed{\exp(99999999999)}",
        r"\boxed{\sum_{i=1}^{10^{12}} i}",
        "#### __import__('os').system('true')",
        "9" * 100_000,
        "1+" * 50_000,
        "(" * 50_000 + "1" + ")" * 50_000,
        "\\boxed{" * 5_000,
    ],
    ids=lambda text: text[:20],
)
def test_nothing_a_model_writes_is_evaluated(text):
    """verl's CVE-2026-6878 was an eval() of model-written answers; a tower of powers would occupy the process for ever."""
    started = time.monotonic()
    assert gsm8k([text], [GOLD]) == [0.0]
    assert time.monotonic() - started < 5


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


def test_without_math_verify(monkeypatch):
    real_import = builtins.__import__

    def no_math_verify(name, *rest):
        if name == "math_verify":
            raise ImportError(name)
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_math_verify)
    with pytest.raises(ImportError, match=r"pip install fastppo\[math\]"):
        gsm8k(["#### 72"], [GOLD])
