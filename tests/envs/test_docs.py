"""What docs/environments.md shows runs as it is written there."""

from __future__ import annotations

import dataclasses
import doctest
import re
import types
from pathlib import Path

import pytest
import yaml

from fastppo.environment_config import EnvironmentConfig
from fastppo.envs import READY_TOOLS, Tools
from fastppo.envs.tools import as_environment
from fastppo.recipe import load_recipe, resolve_environment
from fastppo.recipe_config import RecipeEnvironmentConfig
from tests.envs.worlds import play

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "environments.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def shown():
    """All names that the Python blocks define, run from top to bottom."""
    module = types.ModuleType("environments_of_the_docs")
    for block in (block for block in blocks("python") if not block.startswith(">>>")):
        exec(compile(block, "docs/environments.md", "exec"), module.__dict__)
    return module


def test_the_environment_plays(shown):
    played = play(shown.GuessTheNumber)
    assert all(episode.error is None and 1 <= len(episode.turns) <= 4 for episode in played.episodes)


def test_the_tools_are_tools(shown):
    assert isinstance(shown.environment, Tools)
    assert [tool["function"]["name"] for tool in as_environment(shown.Ledger()).tools] == ["book"]


def test_the_console_says_what_is_shown():
    for block in (block for block in blocks("python") if block.startswith(">>>")):
        test = doctest.DocTestParser().get_doctest(block, {}, "docs/environments.md", None, 0)
        assert doctest.DocTestRunner().run(test).failed == 0


def test_every_setting_is_named():
    written = [yaml.safe_load(block)["environment"] for block in blocks("yaml")]
    EnvironmentConfig(**written[0])
    assert isinstance(resolve_environment(RecipeEnvironmentConfig(**written[1])), Tools)
    for field in dataclasses.fields(RecipeEnvironmentConfig):
        assert f"environment.{field.name}`" in TEXT, field.name
    for name in READY_TOOLS:
        assert f"`{name}`" in TEXT


@pytest.mark.parametrize("name", ["tools", "sandbox"])
def test_the_recipes_have_tools(name):
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    assert isinstance(resolve_environment(recipe.environment), Tools)
