"""What docs/algorithms.md says can be typed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from fastppo.config import AdvantageConfig
from fastppo.recipe import load_recipe
from fastppo.recipe_config import Recipe
from fastppo.recipe_names import Names

KEYS = Names(Recipe).keys

DOCS = (Path(__file__).resolve().parents[2] / "docs" / "algorithms.md").read_text()
SETTINGS = re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL)


@pytest.mark.parametrize("settings", SETTINGS, ids=[text.splitlines()[0] for text in SETTINGS])
def test_papers_as_settings(tmp_path, settings):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(settings)
    assert load_recipe(recipe) != type(load_recipe(recipe))()


def test_every_setting_that_is_named_is_there():
    named = set(re.findall(r"`(\w+)\.(\w+)(?:: [^`]*)?`", DOCS))
    ours = {(section, key) for section, key in named if section in KEYS and section not in ("actor", "algorithm")}
    missing = {(section, key) for section, key in ours if key not in KEYS[section]}
    assert len(ours) > 20 and not missing


def test_every_estimator_is_explained():
    kinds = get_args(get_type_hints(AdvantageConfig)["estimator"])
    assert len(kinds) == 8 and all(f"| `{kind}` |" in DOCS for kind in kinds)
