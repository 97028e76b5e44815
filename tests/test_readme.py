"""What the README and the demo promise runs as written."""

from __future__ import annotations

import importlib.util
import random
import re
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
@pytest.mark.usefixtures("curves")
def test_the_demo_then_the_ten_lines(tmp_path, monkeypatch, capsys):
    """The demo, shortened, leaves the model that the README's example goes on with; the example is run word for word."""
    monkeypatch.chdir(tmp_path)
    demo = load_demo()
    demo.TRAIN, demo.HELD_OUT = 160, 8
    demo.main(["--steps", "1"])
    assert "Curve: runs/demo/curve.png" in capsys.readouterr().out
    assert (tmp_path / "runs" / "demo" / "curve.png").exists()
    with pytest.raises(SystemExit):
        demo.main([])
    assert "'runs/demo', which is there already" in capsys.readouterr().err, "a second demo says so before it works"
    exec(compile(python_blocks()[0], "README.md", "exec"), {})
    assert [row["step"] for row in read_metrics("runs/short")] == [1, 2, 3, 4, 5]
    names: dict = {}
    exec(compile(python_blocks()[3], "README.md", "exec"), names)
    assert len(names["texts"]) == names["rollout"].num_sequences == 8
    exec(compile(python_blocks()[4], "README.md", "exec"), names)
    assert names["rollout"].num_sequences == 3 and len(names["rollout"].turn_bounds) == 7


@pytest.mark.slow
def test_the_demo_teaches(tmp_path, monkeypatch):
    """As `make demo` runs it: the imitator of the careless pupil solves few problems that it was not trained on, PPO makes it solve nearly all."""
    monkeypatch.chdir(tmp_path)
    before, after = load_demo().main([])
    assert before["solved, sampled as in training"] < 0.25 and before["solved, always the likeliest token"] < 0.25
    assert after["solved, sampled as in training"] > 0.9 and after["solved, always the likeliest token"] > 0.9


def test_the_line_that_patches():
    pytest.importorskip("trl", reason="TRL is not installed (make peers)")
    names: dict = {}
    try:
        exec(compile(python_blocks()[1], "README.md", "exec"), names)
        assert importlib.import_module("trl.trainer.utils").selective_log_softmax.__wrapped__
    finally:
        names["trl"].unpatch()


def test_the_ops_for_an_own_trainer_run():
    """The names that the README's third block uses, given tensors of the shapes that trainers have."""
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
        "x": torch.randn(time, width),
        "residual": torch.randn(time, width),
        "weight": torch.randn(width),
        "q": torch.randn(time, 2, width),
        "cos": torch.randn(time, width),
        "sin": torch.randn(time, width),
        "positions": torch.arange(time),
        "gate": torch.randn(time, width),
        "up": torch.randn(time, width),
    }
    exec(compile(python_blocks()[2], "README.md", "exec"), names)
    assert names["logprobs"].shape == (batch, time - 1)
    assert names["sampled"].tokens.shape == (batch,) and names["loss"].dim() == 0
    assert names["normed"].shape == names["gated"].shape == (time, width) and names["q"].shape == (time, 2, width)


def test_the_demo_reward_is_verifiable():
    demo = load_demo()
    completions = ["<think>7+5=12</think>132", "132", "<think>132", "<think></think>133", ""]
    answers = ["132"] * 5
    assert demo.right_answer([], completions, answers) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_the_demo_pupil_forgets_carries_and_nothing_else():
    demo = load_demo()
    assert demo.worked_solution("47+85=") == "<think>7+5=12,4+8+1=13</think>132"
    assert demo.worked_solution("47+85=", forgets=lambda column: True) == "<think>7+5=12,4+8+0=12</think>122"
    for row in demo.make_problems(random.Random(0), 500):
        assert demo.worked_solution(row["prompt"]).endswith(f"</think>{row['answer']}")
        assert demo.judge(row, demo.worked_solution(row["prompt"])).right
        careless = demo.judge(row, demo.worked_solution(row["prompt"], forgets=lambda column: True))
        assert careless.forgot_carry and not careless.right, "every problem needs a carry"


def test_the_demo_holds_out_what_it_does_not_train_on():
    rows = load_demo().make_problems(random.Random(0), 5000)
    assert len({frozenset(row["prompt"].rstrip("=").split("+")) for row in rows}) == 5000


def test_the_demo_names_the_first_mistake():
    demo = load_demo()
    row = {"prompt": "47+85=", "answer": "132"}
    assert demo.judge(row, "<think>7+5=12,4+8+1=14</think>142")[1:] == (False, "4+8+1=14, should be 4+8+1=13", False)
    assert demo.judge(row, "<think>7+5=12,4+8+0=12</think>122")[1:] == (False, "4+8+0=12, should be 4+8+1=13", True)
    assert demo.judge(row, "<think>7+5=12,4+8+1=13</think>133")[1:] == (False, "133, should be 132", False)
    assert demo.judge(row, "")[1:] == (False, "nothing, should be 7+5=12", False)


def test_every_op_of_the_package_is_public():
    for name in fastppo.ops.__all__:
        assert getattr(fastppo, name) is getattr(fastppo.ops, name)
