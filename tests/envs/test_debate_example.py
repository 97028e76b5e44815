"""examples/debate.py: what the beginner is shown, what the seats are paid, and that few tokens do more in debate than alone."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    for name in ("arithmetic", "debate"):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
    return module


def test_the_beginner_minds_what_is_pointed_at(example, monkeypatch):
    monkeypatch.setattr(example, "FORGETS", 1.0)
    for pointed, second in {"0": "1222", "2": "1232", "3": "1322", "23": "1332"}.items():
        monkeypatch.setattr(example, "COLUMNS", (pointed,))
        alone, critic, reviser = example.lesson("589+743=", random.Random(0))
        assert alone["completion"].endswith("</think>1222") and critic["completion"] == pointed
        assert reviser["completion"].endswith(f"</think>{second}")
        assert critic["prompt"] == f"589+743={alone['completion']} "
        assert reviser["prompt"] == f"589+743={alone['completion']}<eos> {pointed}="


def test_the_judge_pays_the_critic_for_what_changed(example):
    texts = {"right": "<think></think>5", "wrong": "<think></think>6"}
    for first, last, solver, critic in [
        ("wrong", "right", 1.0, 1.0),
        ("right", "wrong", 0.0, -1.0),
        ("right", "right", 1.0, 0.0),
        ("wrong", "wrong", 0.0, 0.0),
    ]:
        transcript = [
            {"seat": "solver", "text": texts[first]},
            {"seat": "critic", "text": "2"},
            {"seat": "solver", "text": texts[last]},
        ]
        assert example.judge(["solver", "critic"], [transcript] * 2, ["5"] * 2) == [solver, critic]


@pytest.mark.slow
def test_few_tokens_do_more_in_debate_than_alone(example, tmp_path, monkeypatch):
    """With numbers of two digits. The beginner, who has learned nothing yet, is the control."""
    monkeypatch.setattr(sys.modules["arithmetic"], "DIGITS", 2)
    for setting, value in {"HELD_OUT": 64, "TRAIN": 1500, "IMITATION_EPOCHS": 4}.items():
        monkeypatch.setattr(example, setting, value)
    figures = example.main(["--steps", "2", "--output", str(tmp_path / "run")])
    beginner, alone, debate = figures.values()
    assert debate.debate_tokens < alone.majority_tokens
    assert debate.debate > max(alone.majority, debate.majority, beginner.debate) + 0.1
