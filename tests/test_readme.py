"""What the README and the demo promise runs as written."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

import fastppo
from fastppo.run_folder import read_metrics

ROOT = Path(__file__).resolve().parents[1]


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def load_demo():
    spec = importlib.util.spec_from_file_location("arithmetic", ROOT / "examples" / "arithmetic.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_demo_then_the_ten_lines(tmp_path, monkeypatch, capsys):
    """The demo, shortened, leaves the model that the README's example goes on with; the example is run word for word."""
    monkeypatch.chdir(tmp_path)
    demo = load_demo()
    demo.WARM_UP_STEPS, demo.HELD_OUT = 5, 8
    monkeypatch.setattr(sys, "argv", ["arithmetic.py", "--steps", "1"])
    demo.main()
    assert "Curve: runs/demo/curve.png" in capsys.readouterr().out
    assert (tmp_path / "runs" / "demo" / "curve.png").exists()
    with pytest.raises(SystemExit):
        demo.main()
    assert "'runs/demo', which is there already" in capsys.readouterr().err, "a second demo says so before it works"
    exec(compile(python_blocks()[0], "README.md", "exec"), {})
    assert [row["step"] for row in read_metrics("runs/short")] == [1, 2, 3, 4, 5]
    names: dict = {}
    exec(compile(python_blocks()[2], "README.md", "exec"), names)
    assert len(names["texts"]) == names["rollout"].num_sequences == 8


@pytest.mark.slow
def test_the_demo_reward_climbs(tmp_path, monkeypatch, capsys):
    """Seed 0, as `make demo` runs it: the reward rises by 0.12 or more, and so do the held-out problems that are solved."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["arithmetic.py"])
    load_demo().main()
    rewards = [row["objective/scores"] for row in read_metrics("runs/demo") if row["step"] > 0]
    assert sum(rewards[-5:]) / 5 >= sum(rewards[:5]) / 5 + 0.12
    found = re.search(r"sampled as in training: (\d+)% before PPO, (\d+)%\s+after", capsys.readouterr().out)
    assert int(found[2]) >= int(found[1]) + 12


def test_the_drop_in_ops_run():
    """The names that the README's second block uses, given tensors of the shapes that trainers have."""
    batch, time, vocabulary, width = 2, 7, 11, 8
    names = {
        "logits": torch.randn(batch, time, vocabulary, requires_grad=True),
        "tokens": torch.randint(0, vocabulary, (batch, time)),
        "hidden": torch.randn(batch, time, width),
        "lm_head": torch.nn.Linear(width, vocabulary, bias=False),
        "rewards": torch.randn(batch, time),
        "values": torch.randn(batch, time),
        "mask": torch.rand(batch, time) > 0.2,
        "new_logprobs": torch.randn(batch, time, requires_grad=True),
        "old_logprobs": torch.randn(batch, time),
        "last_logits": torch.randn(batch, vocabulary),
    }
    exec(compile(python_blocks()[1], "README.md", "exec"), names)
    assert names["logprobs"].shape == (batch, time - 1)
    assert names["sampled"].tokens.shape == (batch,) and names["loss"].dim() == 0


def test_the_demo_reward_is_verifiable():
    demo = load_demo()
    assert demo.worked_solution("47+85=") == "<think>7+5=12,4+8+1=13</think>132"
    completions = ["<think>7+5=12</think>132", "132", "<think>132", "<think></think>133", ""]
    answers = ["132"] * 5
    assert demo.right_answer([], completions, answers) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_every_op_of_the_package_is_public():
    for name in fastppo.ops.__all__:
        assert getattr(fastppo, name) is getattr(fastppo.ops, name)
