"""docs/coming_from.md: every name in its tables is a setting, ours and theirs, and its commands are recipes."""

from __future__ import annotations

import importlib.util
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from fastppo.config import AdvantageConfig, LossConfig
from fastppo.recipe import load_recipe
from fastppo.recipe_config import Recipe
from fastppo.recipe_names import Names
from fastppo.rewards import READY

ROOT = Path(__file__).resolve().parents[1]
DOCS = (ROOT / "docs" / "coming_from.md").read_text()
ROWS = [
    re.split(r" ?\| ?", line)[1:-1] for line in DOCS.splitlines() if line.startswith("| ") and "| TRL |" not in line
]

KEYS = {f"{section}.{key}" for section, keys in Names(Recipe).keys.items() for key in keys}
ALONE = {spec.name for spec in fields(Recipe)} | {"--resume"}
CHOICES = {
    choice
    for section in (AdvantageConfig, LossConfig)
    for hint in get_type_hints(section).values()
    for choice in get_args(hint)
    if isinstance(choice, str)
} | set(READY)

# Of PPOConfig in TRL 1.8.0, which is not installed beside 1.16.
TRL_PPO = set(
    "num_mini_batches total_episodes response_length stop_token_id missing_eos_penalty reward_model_path num_ppo_epochs whiten_rewards "
    "kl_coef kl_estimator cliprange vf_coef cliprange_value gamma lam".split()
)


def names(column: int, mark: str = "") -> set[str]:
    """Names in a column: those before the mark, or, without one, before none; without the values that follow some of them."""
    found = set()
    for row in ROWS:
        for text, marked in re.findall(r"((?:`[^`]+`(?:, )?)+) ?([*†]?)", row[column]):
            if marked == mark:
                found |= {re.split(r"[:= ]", name)[0] for name in re.findall(r"`([^`]+)`", text)}
    return found - (CHOICES if column else set())


def test_every_row_has_four_columns_and_a_name_of_ours():
    assert len(ROWS) > 50 and all(len(row) == 4 and "`" in row[0] for row in ROWS)


def test_ours():
    assert not names(0) - KEYS - ALONE - CHOICES


def test_trl():
    trl = pytest.importorskip("trl")
    arguments = set(trl.GRPOTrainer.__init__.__annotations__)
    assert len(names(1)) > 40 and not names(1) - {spec.name for spec in fields(trl.GRPOConfig)}
    assert names(1, "*") == TRL_PPO
    assert names(1, "†") == {"model", "train_dataset", "eval_dataset", "reward_funcs", "peft_config"} <= arguments


def package_file(package: str, path: str) -> str:
    """Text of a file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    return (Path(spec.origin).parent / path).read_text()


def test_verl():
    import yaml

    config = yaml.safe_load(package_file("verl", "trainer/config/_generated_ppo_trainer.yaml"))
    assert len(names(2)) > 45
    for name in names(2):
        section = "actor_rollout_ref." if name.startswith(("actor.", "rollout.")) else ""
        place = config
        for part in f"{section}{name}".split("."):
            assert part in place, name
            place = place[part]


def test_openrlhf():
    text = package_file("openrlhf", "cli/train_ppo_ray.py")
    options = set(re.findall(r'"--([\w.]+)"', text))
    options |= {
        f"{role}.{name}" for role in ("actor", "critic") for name in re.findall(r'f"--\{prefix\}\.([\w.]+)"', text)
    }
    assert len(names(3)) > 40 and not {name.replace("algo.adv.", "algo.advantage.") for name in names(3)} - options


def test_its_commands_are_recipes():
    lines = [
        shlex.split(line, comments=True) for line in re.findall(r"```bash\n(.*?)```", DOCS, re.DOTALL)[0].splitlines()
    ]
    for _, command, recipe, *overrides in lines:
        assert command == "train" and isinstance(load_recipe(ROOT / recipe, overrides), Recipe)
