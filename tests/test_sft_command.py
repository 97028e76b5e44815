"""`fastppo sft` on the command line: what it says at its end, and of mistakes."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from fastppo import cli
from fastppo.run_folder import read_metrics
from tests.tiny import make_model, make_tokenizer


@pytest.fixture
def recipe(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": a, "completion": b} for a in "abcd" for b in "efgh"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = f"device: cpu\noutput_dir: {tmp_path / 'run'}\nmodel: {{name: model}}\ndata: {{path: rows.jsonl}}\n"
    (tmp_path / "recipe.yaml").write_text(text + "learner: {minibatch_size: 4}\n")
    return str(tmp_path / "recipe.yaml")


def test_a_run_and_a_longer_one(recipe, tmp_path, capsys):
    assert cli.main(["sft", recipe]) == 0
    assert "step 4/4  loss 2." in (out := capsys.readouterr().out) and "done: loss 2." in out
    assert cli.main(["sft", recipe]) == 2 and "--resume" in capsys.readouterr().err
    assert cli.main(["sft", recipe, "--resume"]) == 0
    assert "has all its steps; to go on, raise learner.epochs" in capsys.readouterr().out
    assert cli.main(["sft", recipe, "--resume", "learner.epochs=2"]) == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, 9))


def test_an_interruption_says_how_to_go_on(recipe, tmp_path, capsys, monkeypatch):
    from fastppo.run_folder import RunFolder

    log_metrics = RunFolder.log_metrics

    def interrupting(folder, step, metrics):
        log_metrics(folder, step, metrics)
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunFolder, "log_metrics", interrupting)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have the tests ignore it
    try:
        assert cli.main(["sft", recipe]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert f"step-000002; go on with: fastppo sft {recipe} --resume" in capsys.readouterr().err


def test_several_held_out_sets_and_the_best_step_in_a_recipe(recipe, tmp_path, capsys):
    """Paths of sets start beside the recipe."""
    (tmp_path / "held.jsonl").write_text((tmp_path / "rows.jsonl").read_text())
    with open(recipe, "a") as file:
        file.write("evaluation: {every: 2, keep_best: true}\n")
    text = (
        Path(recipe)
        .read_text()
        .replace(
            "data: {path: rows.jsonl}",
            "data: {path: rows.jsonl, eval_sets: {all: {path: held.jsonl}, two: {path: held.jsonl, size: 2}}}",
        )
    )
    Path(recipe).write_text(text)
    assert cli.main(["sft", recipe]) == 0
    last = read_metrics(tmp_path / "run")[-1]
    assert {"eval/all/nll", "eval/two/perplexity", "eval/nll"} <= last.keys()
    assert (tmp_path / "run" / "best" / "model.safetensors").exists()
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--best"]) == 0, capsys.readouterr().err
    assert cli.main(["sft", recipe, "eval_size=3", f"output_dir={tmp_path / 'other'}"]) == 2
    assert "data.eval_size is 3, expected 0 with eval_sets" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name=", "model.name is empty; the recipe has to set it"),
        ("data.path=", "data.path is empty; the recipe has to set it"),
        ("learner.epoch=1", "key learner.epoch is not known; the nearest is epochs"),
        ("total_steps=3", "key total_steps is not known"),
        ("learner.loss_tokens=some", "learner.loss_tokens is 'some': expected 'completion' or 'all'"),
        ("completion_template={answer}", "names the column 'answer', expected one of the data's"),
        ("data.max_tokens=2", "row 0 has 3 tokens with its completion, expected at most 2"),
        ("data.eval_size=16", "eval_size is 16, expected less than 16"),
    ],
)
def test_mistakes_are_one_line(recipe, tmp_path, capsys, override, message):
    assert cli.main(["sft", recipe, override]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
