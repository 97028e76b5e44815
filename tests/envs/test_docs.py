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
from fastppo.envs import READY_TOOLS, AgentProgram, Tools
from fastppo.envs.adapters import READY_ENVIRONMENTS
from fastppo.envs.tools import as_environment
from fastppo.recipe import load_recipe, resolve_environment
from fastppo.recipe_config import RecipeEnvironmentConfig
from tests.envs.tasksets import SINGLE
from tests.envs.worlds import play

ADAPTERS = "fastppo.envs.adapters import"
ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "environments.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def shown():
    """All names that the Python blocks define, run from top to bottom, but for those of other libraries."""
    own = [block for block in blocks("python") if not block.startswith(">>>") and ADAPTERS not in block]
    return run("\n".join(own))


def run(block):
    module = types.ModuleType("environments_of_the_docs")
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


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("Gymnasium", "gymnasium"),
        ("TextArena", "textarena"),
        ("OpenEnv", "openenv.core.generic_client"),
        ("Verifiers", "verifiers.v1"),
        ("MCP", "mcp"),
    ],
)
def test_those_of_other_libraries_are_made(name, package, tmp_path, monkeypatch):
    pytest.importorskip(package, exc_type=ImportError)
    (tmp_path / "my_taskset.py").write_text(SINGLE)
    monkeypatch.syspath_prepend(tmp_path)
    [block] = [block for block in blocks("python") if f"{ADAPTERS} {name}\n" in block]
    shown = run(block)
    if name == "TextArena":
        game = shown.nim()
        game.reset({"prompt": ""}, 1)
        assert "Player 1 removes 2 from pile 0" in game.step("[0 1]")[0]
    if name == "Verifiers":
        assert len(shown.prompts) == 3


def test_every_setting_is_named():
    written = [yaml.safe_load(block)["environment"] for block in blocks("yaml")]
    EnvironmentConfig(**written[0])
    assert isinstance(resolve_environment(RecipeEnvironmentConfig(**written[1])), AgentProgram)
    assert isinstance(resolve_environment(RecipeEnvironmentConfig(**written[2])), Tools)
    RecipeEnvironmentConfig(**written[3])
    for name, maker in READY_ENVIRONMENTS.items():
        assert f"| `{name}` | `{maker.__name__}` | `fastppo[{name.replace('_', '-')}]` |" in TEXT
    for field in dataclasses.fields(RecipeEnvironmentConfig):
        assert f"environment.{field.name}`" in TEXT, field.name
    for name in READY_TOOLS:
        assert f"`{name}`" in TEXT


@pytest.mark.parametrize("name", ["tools", "sandbox"])
def test_the_recipes_have_tools(name):
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    assert isinstance(resolve_environment(recipe.environment), Tools)
