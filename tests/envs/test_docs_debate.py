"""What docs/debate.md shows runs as it is written there."""

from __future__ import annotations

import dataclasses
import re
import types
from pathlib import Path

import pytest

from fastppo.debate_config import Debate, Speech
from fastppo.recipe import load_recipe, resolve_environment
from tests.tiny import make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "debate.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """All names that the Python blocks define, run from top to bottom."""
    monkeypatch.chdir(tmp_path)
    make_tokenizer().save_pretrained("my-model")
    module = types.ModuleType("debates_of_the_docs")
    for block in blocks("python"):
        exec(compile(block, "docs/debate.md", "exec"), module.__dict__)
    return module


def test_the_debate_is_held(shown):
    assert [one.error for one in shown.held.debates] == [None, None]
    assert shown.held.rollout.num_sequences == 4
    assert [speech["seat"] for speech in shown.held.debates[0].transcript(shown.debate)] == [
        "solver",
        "critic",
        "solver",
    ]


def test_the_judge_pays_each_seat(shown):
    transcripts = [
        [{"seat": seat, "text": text} for seat, text in said]
        for said in ([("solver", "4"), ("critic", "no"), ("solver", "5")],) * 2
    ]
    assert shown.judge(["5", "no"], ["solver", "critic"], transcripts, ["5", "5"]) == [1.0, 1.0]


def test_the_settings_are_settings(tmp_path):
    (tmp_path / "recipe.yaml").write_text(blocks("yaml")[0])
    recipe = load_recipe(tmp_path / "recipe.yaml")
    debate = resolve_environment(recipe.environment)
    assert isinstance(debate, Debate) and debate.seats == ("solver", "critic") and recipe.lora.r == 16
    for field in (*dataclasses.fields(Debate), *dataclasses.fields(Speech)):
        assert field.name in TEXT


def test_the_recipe_has_a_debate():
    debate = resolve_environment(load_recipe(ROOT / "recipes" / "debate.yaml").environment)
    assert debate.seats == ("first", "second") and debate.answering == "second"
