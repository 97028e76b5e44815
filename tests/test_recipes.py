"""The recipes run from a clean clone, at toy size; those of stories and gsm8k in tests/test_cli.py."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from pathlib import Path

import pytest

from fastppo import cli
from fastppo.run_folder import read_metrics
from tests.envs.chat import make_chat_tokenizer, trl_template
from tests.test_cli import TINY_STEPS
from tests.tiny import make_model

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "recipes" / "data"


@pytest.fixture
def train(stories_model, tmp_path, monkeypatch, capsys):
    """train(name, ...) -> the rows of metrics of two steps of a recipe, run as its comment says, on a small model"""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)

    def act(name, *overrides):
        recipe = Path("recipes", f"{name}.yaml")
        assert f"fastppo train {recipe}" in recipe.read_text()
        arguments = [*TINY_STEPS, f"model.name={stories_model}", "device=cpu", *overrides]
        assert cli.main(["train", str(recipe), *arguments]) == 0, capsys.readouterr().err
        assert Path("runs", name, "model", "model.safetensors").exists()
        return read_metrics(Path("runs", name))

    return act


def test_a_reward_model_of_ones_own(train, stories_model, capsys):
    """Both commands of recipes/rlhf.yaml."""
    pytest.importorskip("trl", reason="TRL is not installed")
    toy = [f"model.name={stories_model}", "device=cpu", "training.epochs=1", "training.lr=1e-3"]
    assert cli.main(["reward-model", "recipes/reward_model.yaml", *toy]) == 0, capsys.readouterr().err
    metrics = train("rlhf")
    assert {"rewards/reward_model/mean", "objective/kl", "objective/kl_coef"} <= metrics[-1].keys()


def test_bleu(train):
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed")
    assert "rewards/bleu/mean" in train("bleu", "rollout.samples_per_prompt=2")[-1]


def test_grpo(train, gsm8k_train, gsm8k_test):
    files = [f"data.path={gsm8k_train}", f"data.eval_path={gsm8k_test}"]
    metrics = train("grpo", *files, "rollout.samples_per_prompt=2")
    assert "val/explained_var" not in metrics[-1] and "loss/kl_avg" in metrics[-1]


def test_trpo(train):
    metrics = train("trpo")
    assert all(row["policy/kl"] <= 0.01 for row in metrics if row["step"] > 0)


def test_expert_iteration(train):
    """A step of the critic alone, then one with a tree for each prompt; every answer is good enough."""
    toy = ["critic.warmup_steps=1", "reward.solved_score=0", "search.simulations=2", "search.budget=32"]
    first, second = (row for row in train("expert_iteration", *toy) if row["step"] > 0)
    assert "search/kept" not in first and "loss/policy_avg" not in first
    assert second["search/kept"] == 1 and 16 <= second["search/tokens"] <= 32 and second["loss/policy_avg"] > 0


def load_translations():
    spec = importlib.util.spec_from_file_location("translations", DATA / "translations.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CATALOGUE = """
msgid "Enter a valid value."
msgstr "Bitte einen Wert eingeben."

#, python-format
msgid "Enter %(count)s more values."
msgstr "Noch %(count)s Werte eingeben."

msgid "Too short."
msgstr "Zu kurz."

msgid "This one is not translated."
msgstr ""

msgid "Enter a valid value."
msgstr "Ein zweites Mal."

msgid "This one goes on."
msgstr "Das geht "
"noch weiter."
"""


def test_what_is_taken_from_message_catalogues(tmp_path):
    with zipfile.ZipFile(tmp_path / "wheel.whl", "w") as wheel:
        wheel.writestr("django/conf/locale/de/LC_MESSAGES/django.po", CATALOGUE)
        wheel.writestr("django/conf/locale/fr/LC_MESSAGES/django.po", CATALOGUE.replace("Bitte", "S'il vous"))
        found = list(load_translations().pairs(wheel))
    assert found == [{"prompt": "Enter a valid value.", "references": "Bitte einen Wert eingeben."}]


def test_our_translations_are_whole_and_licensed():
    rows = [json.loads(line) for line in (DATA / "translations.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 55 and all(row.keys() == {"prompt", "references"} and all(row.values()) for row in rows)
    assert "Copyright (c) Django Software Foundation" in (DATA / "translations.LICENSE").read_text()


def save_chat_model(folder, *template):
    tokenizer = make_chat_tokenizer(*template)
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=8192)
    for part in (model, tokenizer):
        part.save_pretrained(folder)


def test_an_agent(train, gsm8k_train, gsm8k_test, tmp_path):
    """It asks twice, and each time goes on from what the policy said."""
    for package in ("openai", "starlette", "uvicorn"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    save_chat_model(tmp_path / "chat")
    files = [f"data.path={gsm8k_train}", f"data.eval_path={gsm8k_test}", "data.max_prompt_tokens=1500"]
    metrics = train("agent", *files, f"model.name={tmp_path / 'chat'}")
    assert metrics[-1]["environment/turns"] == 2 and metrics[-1]["environment/sequences"] == 1
    assert metrics[-1]["environment/failure_rate"] == 0


@pytest.mark.parametrize(
    ("name", "metric"),
    [("tools", "environment/turns"), ("sandbox", "environment/turns"), ("debate", "seat/second/tokens")],
)
def test_conversations(train, gsm8k_train, gsm8k_test, tmp_path, name, metric):
    """On a model of single characters, which writes no call: with tools each episode is one turn, scored by its answer."""
    save_chat_model(tmp_path / "chat", trl_template("qwen2_5"))
    files = [f"data.path={gsm8k_train}", f"data.eval_path={gsm8k_test}", "data.max_prompt_tokens=1500"]
    metrics = train(name, *files, f"model.name={tmp_path / 'chat'}")
    assert metrics[-1][metric] >= 1 and "rewards/gsm8k/mean" in metrics[-1]


def test_game(train, tmp_path):
    """On a model of single characters, whose words are no guesses: each game ends with its second invalid move."""
    pytest.importorskip("textarena", reason="textarena is not installed")
    tokenizer = make_chat_tokenizer(trl_template("qwen2_5"))
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=4096)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "chat")
    metrics = train("game", f"model.name={tmp_path / 'chat'}", "evaluation.every=2")
    assert metrics[-1]["environment/turns"] == 2 and metrics[-1]["eval/turns"] == 2
    assert metrics[-1]["environment/failure_rate"] == 0 and metrics[-1]["environment/return"] == 0
