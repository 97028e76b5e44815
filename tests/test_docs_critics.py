"""What docs/critics.md shows runs as it is written there, and what it names is there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from fastppo import cli
from fastppo.recipe import load_recipe
from fastppo.recipe_config import Recipe
from fastppo.recipe_names import Names
from tests.tiny import make_model, make_tokenizer

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "critics.md").read_text()
RECIPE = """
device: cpu
output_dir: runs/ppo
total_steps: 2
model: {name: base}
data: {path: prompts.jsonl}
rollout: {prompts_per_step: 8, max_new_tokens: 6}
reward: {functions: [{function: regex, arguments: {pattern: a}}], timeout: null}
learner: {num_minibatches: 2, epochs: 1}
"""


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_its_commands_and_its_code_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("base")
    make_tokenizer().save_pretrained("base")
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in "abcdefghijklmnop"))
    Path("recipe.yaml").write_text(RECIPE)
    for line in blocks("bash")[0].splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "fastppo" and cli.main(words[1:]) == 0, line + capsys.readouterr().err
    names: dict = {}
    exec(compile(blocks("python")[0], "docs/critics.md", "exec"), names)
    assert names["done"].folder.is_dir()


@pytest.mark.parametrize("settings", blocks("yaml"), ids=[text.splitlines()[0] for text in blocks("yaml")])
def test_its_settings_can_be_typed(tmp_path, settings):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(settings)
    assert load_recipe(recipe) != Recipe()


def test_every_setting_that_is_named_is_there_and_every_one_is_named():
    keys = Names(Recipe).keys
    named = {(section, key) for section, key in re.findall(r"`(\w+)\.(\w+)(?:: [^`]*)?`", TEXT) if section in keys}
    assert len(named) > 15 and not {(section, key) for section, key in named if key not in keys[section]}
    assert not [key for key in keys["critic"] if key not in TEXT and key != "vf_coef"]
