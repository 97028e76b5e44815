"""PPO learns, and only from the reward: a task goes from chance to > 0.9, its controls stay at chance."""

from __future__ import annotations

import random

import pytest

from fastppo.run_folder import read_metrics

LENGTH = 6
SETTINGS = {
    "total_steps": 20,
    "rollout__prompts_per_step": 32,
    "rollout__samples_per_prompt": 4,
    "rollout__batch_size": 128,
    "rollout__max_new_tokens": LENGTH,
    "rollout__min_new_tokens": LENGTH,
    "optimizer__lr": 3e-3,
    "critic__lr": 3e-3,
    "learner__num_minibatches": 4,
    "learner__epochs": 2,
    "advantage__gae_lambda": 1.0,
    "optimizer__schedule": "linear",
}
PROMPTS = ["a", "b"]  # what is right depends on the prompt


def copies_of_first(prompts, completions, **_):
    """Share of the completion's letters that equal the prompt: chance is 1/17."""
    return [text.count(prompt) / LENGTH for prompt, text in zip(prompts, completions, strict=True)]


def shuffled(prompts, completions, **_):
    """The same rewards, dealt to the wrong samples."""
    scores = copies_of_first(prompts, completions)
    random.Random(0).shuffle(scores)
    return scores


def learn(make_trainer, tmp_path, reward=copies_of_first, **changes) -> tuple[float, float]:
    """True task reward in the first and over the last steps, measured on what the policy samples."""
    true_rewards = []

    def recording(prompts, completions, **_):
        scores = copies_of_first(prompts, completions)
        true_rewards.append(sum(scores) / len(scores))
        return reward(prompts, completions)

    make_trainer(recording, prompts=PROMPTS, **(SETTINGS | changes)).train()
    return true_rewards[0], sum(true_rewards[-3:]) / 3


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_ppo_learns_from_chance_to_mastery(make_trainer, tmp_path, critic):
    first, last = learn(make_trainer, tmp_path, critic__kind=critic)
    assert first < 0.15
    assert last > 0.9
    variances = [row["val/explained_var"] for row in read_metrics(tmp_path / "run") if "val/explained_var" in row]
    assert max(variances[5:]) > 0.15, "the critic learns too"


def test_nothing_is_learned_at_learning_rate_zero(make_trainer, tmp_path):
    first, last = learn(make_trainer, tmp_path, optimizer__lr=0.0, critic__lr=0.0)
    assert first < 0.15 and last < 0.15


def test_nothing_is_learned_from_shuffled_rewards(make_trainer, tmp_path):
    first, last = learn(make_trainer, tmp_path, reward=shuffled)
    assert first < 0.15 and last < 0.25
