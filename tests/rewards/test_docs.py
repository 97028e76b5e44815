"""What docs/rewards.md shows runs as it is written there."""

from __future__ import annotations

import doctest
import re
import types
from pathlib import Path

import pytest

from fastppo.config import RewardConfig
from fastppo.data.sources import is_task
from fastppo.recipe import load_recipe, resolve_rewards
from fastppo.rewards import READY, RewardRunner, http
from fastppo.rewards.result import LARGEST_SCORE
from tests.tiny import make_reward_model, make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "rewards.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def shown():
    """All names that the Python blocks define, run from top to bottom."""
    module = types.ModuleType("rewards_of_the_docs")
    for block in (block for block in blocks("python") if not block.startswith(">>>")):
        exec(compile(block, "docs/rewards.md", "exec"), module.__dict__)
    return module


def test_a_reward_is_tried_as_shown(shown):
    assert shown.result.scores == [1 - 0.001, -0.007] and shown.result.errors == []


def test_a_weighted_sum_prefers_the_plain_sentence(shown):
    assert shown.nice.errors == [] and shown.nice.scores[0] > 0 > shown.nice.scores[1]


@pytest.mark.parametrize(
    ("name", "expected"), [("graded", [1, 1, 0]), ("judged", [0, 1, 0])], ids=["with a pool", "async"]
)
@pytest.mark.parametrize("timeout", [20.0, None], ids=["forked", "in-process"])
def test_the_examples_work_step_after_step(shown, name, expected, timeout):
    with RewardRunner(getattr(shown, name), timeout=timeout, retries=0) as runner:
        for _ in range(2):
            result = runner(["p"] * 3, ["short", "because", "x" * 100], {})
            assert result.errors == [] and result.scores == expected


def test_a_model_is_asked_as_shown(shown):
    model = make_reward_model(num_labels=2)
    with pytest.raises(TypeError, match="docs/rewards.md"):
        RewardRunner(model, timeout=None)
    with RewardRunner(shown.Sentiment(model, make_tokenizer()), timeout=20, retries=0) as runner:
        result = runner(["ab", "c"], ["cd", "d"], {})
    assert result.errors == [] and len(set(result.scores)) == 2 and all(0 < score < 1 for score in result.scores)


def test_the_recipe_is_one(tmp_path):
    recipe = blocks("yaml")[0]
    code = next(block for block in blocks("python") if "def close_to" in block)
    (tmp_path / "my_rewards.py").write_text(code)
    (tmp_path / "recipe.yaml").write_text(recipe)
    reward = resolve_rewards(load_recipe(tmp_path / "recipe.yaml").reward)
    with RewardRunner(reward, timeout=None) as runner:
        assert runner(["p", "q"], ["x" * 30, "y " * 20], {}).scores == [-0.1, 0.5 * -17 / 18]


def test_the_other_recipes_are_recipes(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    _, server, task = blocks("yaml")
    (tmp_path / "server.yaml").write_text(server)
    (reward,) = resolve_rewards(load_recipe(tmp_path / "server.yaml").reward)
    RewardRunner(reward, timeout=None)
    assert reward.function.func is http and reward.function.keywords["headers"] == {"Authorization": "Bearer s3cret"}
    (tmp_path / "task.yaml").write_text(task)
    recipe = load_recipe(tmp_path / "task.yaml")
    (reward,) = resolve_rewards(recipe.reward)
    assert reward.function is READY["reasoning_gym"] and is_task(recipe.data.path)


def test_ready_rewards_score_as_shown():
    failed = []
    shown = [block for block in blocks("python") if block.startswith(">>>")]
    for number, block in enumerate(shown):
        test = doctest.DocTestParser().get_doctest(block, {}, f"example {number}", "docs/rewards.md", 0)
        doctest.DocTestRunner().run(test, out=failed.append)
    assert shown and not failed, "".join(failed)


def test_every_ready_reward_is_in_the_table():
    rows = re.findall(r"^\| (\[?`.*?) \|", TEXT, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(READY)


def test_its_figures_are_the_defaults():
    config = RewardConfig()
    for setting in ("timeout", "retries", "max_failure_rate"):
        assert re.search(rf"`reward\.{setting}`[^(`]*\({getattr(config, setting):g}( s)?\)", TEXT), setting
    assert f"more than {LARGEST_SCORE:g} in size".replace("+", "") in TEXT
