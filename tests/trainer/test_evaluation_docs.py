"""What docs/evaluation.md shows runs as it is written there, and what it lists is what there is."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from fastppo.callbacks import EVENTS
from fastppo.checkpoint import list_checkpoints
from fastppo.data import load_train_and_eval
from fastppo.evaluation_config import DifficultyConfig
from fastppo.recipe_config import DataConfig
from fastppo.run_folder import read_metrics
from tests.test_readme import load_demo
from tests.tiny import make_model

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "evaluation.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_its_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer = load_demo().make_tokenizer()
    tokenizer.save_pretrained("runs/demo/model")
    make_model(vocab_size=len(tokenizer)).save_pretrained("runs/demo/model")
    names: dict = {}
    for block in blocks("python"):
        exec(compile(block, "docs/evaluation.md", "exec"), names)
    rows = read_metrics("runs/alike")
    shown = set(re.findall(r"`(eval/\S+)`", TEXT)) - {"eval/nll"}  # which fine-tuning has
    shown = {name for name in shown if name.count("/") == 1 and "..." not in name and "pass@k" not in name}
    plain = {name for row in rows for name in row}
    assert {name.replace("eval/", "eval/small/") for name in shown} <= plain and "eval/scores" in plain
    assert {"eval/large/greedy/pass@1", "eval/small/pass@4", "difficulty/hard"} <= plain
    best = max(rows, key=lambda row: row["eval/scores"])["step"]
    assert best in list_checkpoints("runs/alike/checkpoints") and Path("runs/alike/best/model.safetensors").exists()
    assert len(names["diary"].lines) == 3 and names["diary"].lines[0].startswith("0: ")


def test_its_settings_are_settings(tmp_path, monkeypatch):
    data, difficulty = map(yaml.safe_load, blocks("yaml"))
    monkeypatch.chdir(tmp_path)
    for name in ("train", "short", "long"):
        Path(f"{name}.jsonl").write_text('{"prompt": "1+2="}\n' * 3)
    _, held_out = load_train_and_eval(DataConfig(**data["data"]), load_demo().make_tokenizer())
    assert {name: len(rows) for name, rows in held_out.items()} == {"short": 3, "long": 2}
    assert DifficultyConfig(**difficulty["difficulty"]) != DifficultyConfig()


def test_every_event_is_listed():
    assert all(f"| `{name}(" in TEXT for name in EVENTS)
