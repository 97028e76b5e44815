"""`data.eval_sets`: several held-out sets of a recipe, each with a path, a split and a size."""

from __future__ import annotations

import json
import re

import pytest

from fastppo.data import load_train_and_eval
from fastppo.recipe import load_recipe
from fastppo.recipe_config import DataConfig


@pytest.fixture
def files(tmp_path):
    for name, count in (("train", 5), ("easy", 3), ("hard", 4)):
        rows = [json.dumps({"question": f"{name} {i}", "answer": i}) + "\n" for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    return tmp_path


def split(tokenizer, files, **config):
    config = DataConfig(path=str(files / "train.jsonl"), prompt_template="{question}", **config)
    return load_train_and_eval(config, tokenizer)


def test_each_has_its_rows(tokenizer, files):
    """And all of `path` is trained on."""
    sets = {"easy": {"path": str(files / "easy.jsonl")}, "hard": {"path": files / "hard.jsonl", "size": 2}}
    train, held_out = split(tokenizer, files, eval_sets=sets)
    assert [row["prompt"] for row in train] == [f"train {i}" for i in range(5)]
    assert {name: [row["prompt"] for row in rows] for name, rows in held_out.items()} == {
        "easy": ["easy 0", "easy 1", "easy 2"],
        "hard": ["hard 0", "hard 1"],
    }


def test_a_split_of_the_hub_data_set_that_is_trained_on(tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")
    splits = {"train": [{"prompt": "a"}], "test": [{"prompt": "b"}, {"prompt": "c"}]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: datasets.Dataset.from_list(splits[split]))
    config = DataConfig(path="openai/gsm8k:main", eval_sets={"seen": {"split": "test", "size": 1}})
    train, held_out = load_train_and_eval(config, tokenizer)
    assert ([row["prompt"] for row in train], [row["prompt"] for row in held_out["seen"]]) == (["a"], ["b"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_sets": {"a": {"size": 1}}}, "eval_sets.a has neither a path nor a split of its own"),
        (
            {"eval_sets": {"a": {"path": "HARD", "size": 5}}},
            "eval_sets.a.size is 5, expected at most 4, the number of rows",
        ),
        ({"eval_sets": {"a": {"path": "HARD", "split": "test"}}}, "eval_sets.a.split is 'test', but"),
        ({"eval_sets": {"a": {"split": "test"}}}, "eval_sets.a.split is 'test', but"),
        (
            {"eval_sets": {"a": {"path": "reasoning_gym:sum"}}},
            "eval_sets.a.path is 'reasoning_gym:sum', expected no task",
        ),
        ({"eval_sets": {"a": {"path": "HARD"}}, "eval_size": 3}, "eval_size is 3, expected 0 with eval_sets"),
        (
            {"eval_sets": {"a": {"path": "HARD"}}, "eval_split": "test"},
            "eval_split is 'test', expected None with eval_sets",
        ),
        ({"eval_sets": {"a b": {"path": "HARD"}}}, "a b"),
    ],
)
def test_what_does_not_fit_is_named(tokenizer, files, changes, message):
    for chosen in changes["eval_sets"].values():
        if chosen.get("path") == "HARD":
            chosen["path"] = str(files / "hard.jsonl")
    with pytest.raises(ValueError, match=re.escape(message)):
        split(tokenizer, files, **changes)


def test_in_a_recipe(files):
    """Paths start beside it; a key that is not known is named with the nearest."""
    recipe = files / "recipe.yaml"
    recipe.write_text("data:\n  path: train.jsonl\n  eval_sets:\n    easy: {path: easy.jsonl, size: 2}\n")
    assert load_recipe(recipe).data.eval_sets["easy"].path == str(files / "easy.jsonl")
    with pytest.raises(ValueError, match="key data.eval_sets.easy.sise is not known; the nearest is size"):
        load_recipe(recipe, ["data.eval_sets={easy: {path: easy.jsonl, sise: 2}}"])
    with pytest.raises(ValueError, match="data.eval_size is 3, expected 0 with eval_sets, which have their own"):
        load_recipe(recipe, ["data.eval_size=3"])
