"""What docs/sft.md shows runs, in the order shown, at toy size."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fastppo import cli
from fastppo.recipe import load_recipe
from fastppo.recipe_names import Names
from fastppo.run_folder import read_metrics
from fastppo.sft_config import ExamplesConfig, SFTCheckpointConfig, SFTLearnerConfig, SFTRecipe
from tests.test_readme import load_demo

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "sft.md").read_text()
TOY = ["total_steps=1", "rollout.prompts_per_step=4", "rollout.samples_per_prompt=1", "rollout.max_new_tokens=16"]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def demo_model(tmp_path, monkeypatch):
    """The demo's, untrained, where the examples look for it."""
    monkeypatch.chdir(tmp_path)
    demo = load_demo()
    tokenizer = demo.make_tokenizer()
    demo.make_model(tokenizer).save_pretrained("runs/demo/model")
    tokenizer.save_pretrained("runs/demo/model")


def test_its_recipe(demo_model):
    Path("recipe.yaml").write_text(blocks("yaml")[0])
    Path("examples.jsonl").write_text(blocks("text")[0] * 40)
    assert cli.main(["sft", "recipe.yaml", "device=cpu"]) == 0
    rows = read_metrics("runs/my_sft")
    assert [row["step"] for row in rows if "eval/perplexity" in row] == [0, 5, 10]
    assert rows[-1]["eval/nll"] < rows[0]["eval/nll"]


def test_its_several_held_out_sets(tmp_path):
    (tmp_path / "recipe.yaml").write_text(blocks("yaml")[1])
    recipe = load_recipe(tmp_path / "recipe.yaml", (), SFTRecipe)
    assert recipe.data.eval_sets["long"].size == 2 and recipe.evaluation.metric == "eval/nll"
    assert recipe.data.eval_sets["short"].path == str(tmp_path / "short.jsonl")


def test_its_python(demo_model):
    for block in blocks("python"):
        exec(compile(block, "docs/sft.md", "exec"), {})
    assert read_metrics("runs/sums")[-1]["epoch"] == 2


@pytest.mark.usefixtures("curves")
def test_the_commands(stories_model, tmp_path, monkeypatch, capsys):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    sft, train = [shlex.split(line, comments=True)[1:] for line in blocks("bash")[0].splitlines()]
    toy = [f"model.name={stories_model}", "optimizer.lr=1e-3", "learner.epochs=1", "evaluation.every=0"]
    assert cli.main([*sft, *toy, "device=cpu"]) == 0, capsys.readouterr().err
    rows = read_metrics("runs/sft")
    assert rows[-1]["eval/nll"] < rows[0]["eval/nll"], "stories of the kind are likelier"
    assert Path("runs/sft/curve.png").exists()
    assert cli.main([*train, *TOY, "device=cpu", "data.eval_size=4"]) == 0, capsys.readouterr().err


def test_its_settings_and_figures_are_there():
    for section, key in re.findall(r"`(\w+)\.(\w+)(?:: \w+)?`", TEXT):
        if section != "fastppo" and key != "jsonl":  # modules and files
            assert key in Names(SFTRecipe).keys[section], f"{section}.{key}"
    assert f"`learner.minibatch_size` ({SFTLearnerConfig.minibatch_size})" in TEXT
    assert f"`learner.tokens_per_microbatch` ({SFTLearnerConfig.tokens_per_microbatch})" in TEXT
    assert f"`checkpoint.every` ({SFTCheckpointConfig.every})" in TEXT
    assert not ExamplesConfig.drop_long_rows
