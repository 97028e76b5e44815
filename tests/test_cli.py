"""The command line: exit codes, one-line errors, and commands that do what they say."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from fastppo import cli

RECIPE = "model: {{name: {model}}}\ndata: {{path: {data}}}\nreward: {{function: '{reward}'}}\nppo: {{total_steps: 1}}\n"


def write_recipe(tmp_path, model="", data="", reward="fastppo.rewards:exact_answer"):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=model or "./no-model", data=data or "./no-data.jsonl", reward=reward))
    return path


def error_of(capsys, *arguments) -> str:
    assert cli.main(list(map(str, arguments))) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fastppo: error: ") and captured.err.count("\n") == 1, "one line, no traceback"
    return captured.err


def test_mistakes_are_one_line_each(tmp_path, capsys):
    assert "nowhere.yaml" in error_of(capsys, "train", tmp_path / "nowhere.yaml")
    assert "nearest is lr" in error_of(capsys, "train", write_recipe(tmp_path), "ppo.lrr=1")
    assert "no-model" in error_of(capsys, "train", write_recipe(tmp_path))
    assert "sqr" in error_of(capsys, "train", write_recipe(tmp_path, reward="math:sqr"))
    assert "data.path is empty" in error_of(capsys, "train", write_recipe(tmp_path), "data.path=")
    assert "no run folder" in error_of(capsys, "plot", tmp_path)


def test_traceback_on_request(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTPPO_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        cli.main(["train", str(tmp_path / "nowhere.yaml")])


def test_info_lists_every_op(capsys):
    from fastppo.ops._backends import FAST_BACKENDS

    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert all(op in printed for op in FAST_BACKENDS)


def test_help_and_version_answer_at_once():
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "fastppo", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "train" in done.stdout and "bench" in done.stdout
    code = "import sys, fastppo.cli; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0, "no Transformers import"
    assert time.perf_counter() - start < 60


def test_interrupting_a_run_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_train", interrupted)
    assert cli.main(["train", str(write_recipe(tmp_path))]) == 130


def train(recipe, *arguments) -> int:
    return cli.main(["train", str(recipe), "device=cpu", *map(str, arguments)])


TINY_STEPS = ["ppo.total_steps=2", "ppo.prompts_per_step=4", "ppo.samples_per_prompt=1", "ppo.max_new_tokens=16"]


def test_training_a_real_model_from_its_recipe(stories_model, tmp_path, capsys):
    """recipes/stories.yaml on the real pretrained Llama, shortened: runs, records, plots, resumes."""
    run = tmp_path / "run"
    arguments = [*TINY_STEPS, "data.eval_size=4", f"ppo.output_dir={run}"]
    assert train("recipes/stories.yaml", *arguments) == 0
    assert "done: reward" in capsys.readouterr().out
    assert {"config.yaml", "metrics.jsonl", "samples.jsonl", "curve.png", "checkpoints", "model"} <= {
        p.name for p in run.iterdir()
    }
    assert cli.main(["plot", str(run), "-o", str(tmp_path / "x.png")]) == 0 and (tmp_path / "x.png").exists()
    assert "--resume" in error_of(capsys, "train", "recipes/stories.yaml", *arguments)
    assert train(run / "config.yaml", "ppo.total_steps=3", "--resume") == 0


def test_gsm8k_end_to_end_on_a_tiny_model_of_its_architecture(gsm8k_train, stories_model, tmp_path):
    """recipes/gsm8k.yaml with a random Qwen2 of two layers: real questions, the real reward, every part of the path."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(stories_model)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run = tmp_path / "run"
    changes = [f"model.name={tmp_path / 'model'}", f"ppo.output_dir={run}", "data.eval_size=4", *TINY_STEPS]
    assert train("recipes/gsm8k.yaml", *changes) == 0
    assert (run / "model" / "model.safetensors").exists()
