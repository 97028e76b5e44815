"""From preferences to a reward model to PPO: what people preferred is what the policy comes to do, and only by learning."""

from __future__ import annotations

import json
import random

import pytest

from fastppo.reward_model_config import RewardModelRecipe
from fastppo.rewards import RewardModel
from tests.tiny import LETTERS, make_model, make_tokenizer
from tests.trainer.test_learning import LENGTH, PROMPTS, SETTINGS, copies_of_first

SHARE = [0.05, 0.2, 0.5, 0.9]  # of the letters of an answer, those that equal the prompt


def preferences(count):
    """Of two answers the one with more letters that equal the prompt is preferred. The others hold the other prompt's letter in plenty: a model
    that liked both letters after either prompt would tell most pairs apart, and PPO would find out."""
    draw, rows = random.Random(0), []
    while len(rows) < count:
        prompt, answers = draw.choice(PROMPTS), []
        others = LETTERS + LETTERS.replace(prompt, "")[0] * len(LETTERS)
        for _ in range(2):
            share = draw.choice(SHARE)
            answers.append("".join(prompt if draw.random() < share else draw.choice(others) for _ in range(LENGTH)))
        worse, better = sorted(answers, key=lambda text: text.count(prompt))
        if better.count(prompt) > worse.count(prompt):
            rows.append({"prompt": prompt, "chosen": better, "rejected": worse})
    return rows


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """Folder of a reward model that tells more than nine of ten held-out pairs apart."""
    pytest.importorskip("trl", reason="TRL is not installed")
    from fastppo.reward_model_training import train_reward_model

    folder = tmp_path_factory.mktemp("reward_model")
    make_model(seed=1).save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preferences(2000)))
    recipe = RewardModelRecipe(
        output_dir=folder / "rm",
        device="cpu",
        model={"name": folder / "base"},
        data={"path": folder / "pairs.jsonl", "eval_size": 200},
        training={"epochs": 8, "lr": 3e-3, "batch_size": 32, "microbatch_size": 32},
    )
    assert train_reward_model(recipe, note=lambda text: None)["accuracy"] > 0.9
    return folder / "rm" / "model"


class Shuffled:
    """A reward's scores, dealt to the wrong samples."""

    in_process = True

    def __init__(self, reward):
        self.reward = reward

    def __call__(self, prompts, completions):
        scores = self.reward(prompts, completions)
        random.Random(0).shuffle(scores)
        return scores


def learn(make_trainer, reward, **changes) -> tuple[float, float]:
    """True share of right letters in the first and over the last steps; the policy is only told the model's score."""
    shares = []

    def watching(prompts, completions):
        found = copies_of_first(prompts, completions)
        shares.append(sum(found) / len(found))
        return [None] * len(found)

    trainer = make_trainer([reward, watching], prompts=PROMPTS, **(SETTINGS | changes))
    trainer.train()
    return shares[0], sum(shares[-3:]) / 3


@pytest.mark.slow
def test_ppo_learns_what_was_preferred(make_trainer, reward_model):
    first, last = learn(make_trainer, RewardModel(reward_model, device="cpu"))
    assert first < 0.15
    assert last > 0.8


@pytest.mark.slow
def test_nothing_is_learned_at_learning_rate_zero(make_trainer, reward_model):
    first, last = learn(
        make_trainer, RewardModel(reward_model, device="cpu"), optimizer__lr=0.0, critic__lr=0.0, total_steps=6
    )
    assert first < 0.15 and last < 0.15


@pytest.mark.slow
def test_nothing_is_learned_from_shuffled_scores(make_trainer, reward_model):
    first, last = learn(make_trainer, Shuffled(RewardModel(reward_model, device="cpu")))
    assert first < 0.15 and last < 0.25
