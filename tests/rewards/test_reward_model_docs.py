"""What docs/reward_models.md shows runs, in the order shown, at toy size."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from fastppo import cli
from fastppo.recipe import load_recipe, resolve_rewards
from fastppo.reward_model_config import RewardCheckpointConfig, RewardTrainingConfig
from fastppo.rewards import RewardModel, RewardRunner
from tests.tiny import make_reward_model, make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "reward_models.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two reward models where the examples look for them."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("my_reward_model", "other_seed")):
        make_reward_model(seed, max_position_embeddings=128).save_pretrained(Path("runs") / name / "model")
        make_tokenizer().save_pretrained(Path("runs") / name / "model")


def test_python(folders):
    _, alone, ensemble = blocks("python")
    names: dict = {}
    exec(alone + ensemble, names)
    assert len(set(names["scores"])) == 2
    assert names["careful"](["ab"], ["c"])[0] < max(
        RewardModel(f"runs/{n}/model")(["ab"], ["c"])[0] for n in ("my_reward_model", "other_seed")
    )


def test_the_rewards_of_a_recipe(folders):
    Path("recipe.yaml").write_text(blocks("yaml")[1])
    with RewardRunner(resolve_rewards(load_recipe("recipe.yaml").reward), timeout=20) as runner:
        result = runner(["ab"], ["c"], {})
    assert result.errors == [] and set(result.by_name) == {"reward_model", "repetition"}


def test_training_in_python(stories_model, tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="TRL is not installed")
    monkeypatch.chdir(tmp_path)
    recipe = blocks("yaml")[0].replace("runs/demo/model", str(stories_model))
    assert str(stories_model) in recipe
    Path("reward_model.yaml").write_text(recipe)
    (row,) = blocks("text")
    json.loads(row)
    Path("pairs.jsonl").write_text((ROOT / "recipes" / "data" / "preferences.jsonl").read_text() + row)
    names: dict = {}
    exec(blocks("python")[0], names)
    assert names["metrics"]["held_out_pairs"] == 50 and Path("runs/my_reward_model/model").is_dir()


def test_the_commands(stories_model, tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl", reason="TRL is not installed")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    install, *commands = [shlex.split(line, comments=True) for line in blocks("bash")[0].splitlines()]
    toy = ["total_steps=1", "rollout.prompts_per_step=4", "rollout.samples_per_prompt=1", "rollout.max_new_tokens=16"]
    toy += ["learner.num_minibatches=1", "data.eval_size=4"]
    for words, more in zip(commands, (["epochs=1"], toy), strict=True):
        assert cli.main([*words[1:], f"model.name={stories_model}", "device=cpu", *more]) == 0, capsys.readouterr().err
    assert Path("runs/rlhf/model").is_dir() and install[:2] == ["pip", "install"]


def test_its_figures_are_the_defaults():
    assert re.search(rf"`training.center_coef` \({RewardTrainingConfig.center_coef}\)", TEXT)
    assert re.search(rf"`training.max_length` \({RewardTrainingConfig.max_length}\)", TEXT)
    assert f"`checkpoint.every` ({RewardCheckpointConfig.every})" in TEXT
    assert f"`checkpoint.keep` ({RewardCheckpointConfig.keep})" in TEXT
