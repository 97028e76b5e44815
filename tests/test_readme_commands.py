"""Every command that the README shows runs, at toy size, in a folder of its own."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fastppo import cli

ROOT = Path(__file__).resolve().parents[1]
TOY = [
    "device=cpu",
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=1",
    "rollout.max_new_tokens=16",
    "data.eval_size=4",
]


def commands() -> list[list[str]]:
    """The words of each line of the fenced bash blocks, without its comment."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words for words in lines if words]


def test_make_has_the_targets():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [words[1:] for words in commands() if words[0] == "make"] == [["demo"], ["test"]]
    assert {"demo", "test"} <= set(targets)


@pytest.mark.usefixtures("curves")
def test_every_other_line_runs_in_the_order_shown(
    stories_model, gsm8k_train, gsm8k_test, tmp_path, monkeypatch, capsys
):
    """The steps build on each other: a run is resumed, sampled from and plotted."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    model = f"model.name={stories_model}"
    toy = {
        "recipes/sft.yaml": [model, "learner.epochs=1"],
        "recipes/stories.yaml": [model],
        "recipes/gsm8k.yaml": [model, f"data.path={gsm8k_train}", f"data.eval_path={gsm8k_test}"],
    }
    shown = []
    for words in commands():
        if words[0] == "make":
            continue
        assert words[0] == "fastppo"
        command, arguments = words[1], words[2:]
        if command == "serve":  # has no end; tests/serve/test_command.py
            continue
        if command == "sft":
            arguments[1:1] = ["device=cpu", "data.eval_size=4", *toy[arguments[0]]]
        elif command == "train":
            steps = 2 if "--resume" in arguments else 1
            arguments[1:1] = [*TOY, *toy[arguments[0]], f"total_steps={steps}"]
        elif command == "critic":
            arguments[1:1] = [*TOY, *toy[arguments[0]]]
        elif command == "generate":
            arguments += ["--max-new-tokens", "8"]
        elif command == "bench":
            arguments += ["--quick", "--op", "gae"]
        assert cli.main([command, *arguments]) == 0, f"{shlex.join(words)}: {capsys.readouterr().err}"
        shown.append(command)
    expected = [
        "sft",
        "train",
        "train",
        "train",
        "critic",
        "plan",
        "generate",
        "generate",
        "export",
        "plot",
        "report",
        "doctor",
        "info",
        "info",
    ]
    expected += ["bench"]
    assert shown == expected
    assert (tmp_path / "runs" / "stories" / "curve.png").exists()
    assert (tmp_path / "runs" / "stories" / "report.html").exists()
