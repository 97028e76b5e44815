"""What docs/lora.md and docs/memory.md show runs, at toy size."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fastppo import cli
from fastppo.recipe import load_recipe
from fastppo.recipe_config import Recipe
from fastppo.recipe_names import Names
from tests.tiny import make_model, make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
DOCS = {name: (ROOT / "docs" / name).read_text() for name in ("lora.md", "memory.md")}
TOY = ["device=cpu", "total_steps=1", "data.eval_size=4", "learner.num_minibatches=1"]
TOY += ["rollout.prompts_per_step=4", "rollout.samples_per_prompt=1", "rollout.max_new_tokens=16"]

peft = pytest.importorskip("peft")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS["lora.md"], re.DOTALL)


def test_the_recipe_runs(stories_model, tmp_path, monkeypatch, capsys):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    _, words = [shlex.split(line, comments=True) for line in blocks("bash")[0].splitlines()]
    assert cli.main([*words[1:], f"model.name={stories_model}", *TOY]) == 0, capsys.readouterr().err
    assert {"model", "adapter", "checkpoints"} <= {path.name for path in Path("runs/lora").iterdir()}


def test_the_settings_are_settings(tmp_path):
    (tmp_path / "recipe.yaml").write_text(blocks("yaml")[0])
    lora = load_recipe(tmp_path / "recipe.yaml").lora
    assert (lora.r, lora.alpha, lora.target_modules) == (16, 32, ("q_proj", "v_proj"))


def test_the_code_and_its_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("my-model")
    make_tokenizer("Onceupatimdy ").save_pretrained("my-model")
    exec(compile(blocks("python")[0], "docs/lora.md", "exec"), {})
    assert 'PeftModel.from_pretrained(base, "runs/mine/adapter")' in DOCS["lora.md"]
    peft.PeftModel.from_pretrained(make_model(), "runs/mine/adapter")


@pytest.mark.parametrize("name", DOCS)
def test_every_setting_that_is_named_is_there(name):
    keys = Names(Recipe).keys
    named = {
        (section, key) for section, key in re.findall(r"`(\w+)\.(\w+)(?:: [^`]*)?`", DOCS[name]) if section in keys
    }
    assert len(named) >= 2 and all(key in keys[section] for section, key in named)
