"""A reward that comes long after what earned it: GAE's lambda says how far back the credit reaches."""

from __future__ import annotations

import random

import pytest

from tests.trainer.test_learning import PROMPTS, SETTINGS

LENGTH = 12
SETTINGS = SETTINGS | {"rollout__max_new_tokens": LENGTH, "rollout__min_new_tokens": LENGTH}


def first_is_right(prompts, completions, **_):
    """1 where the first letter equals the prompt, paid after the last letter; those between make no difference. Chance is 1/17."""
    return [float(text.startswith(prompt)) for prompt, text in zip(prompts, completions, strict=True)]


def shuffled(prompts, completions, **_):
    """The same rewards, dealt to the wrong samples."""
    scores = first_is_right(prompts, completions)
    random.Random(0).shuffle(scores)
    return scores


def learn(make_trainer, reward=first_is_right, **changes) -> tuple[float, float]:
    """True task reward in the first and over the last steps, measured on what the policy samples."""
    found = []

    def recording(prompts, completions):
        scores = first_is_right(prompts, completions)
        found.append(sum(scores) / len(scores))
        return reward(prompts, completions)

    make_trainer(recording, prompts=PROMPTS, **(SETTINGS | changes)).train()
    return found[0], sum(found[-3:]) / 3


@pytest.mark.slow
def test_lambda_one_reaches_the_letter_that_earned_it(make_trainer):
    first, last = learn(make_trainer, advantage__gae_lambda=1.0)
    assert first < 0.2
    assert last > 0.6


@pytest.mark.slow
def test_lambda_zero_does_not_in_the_same_time(make_trainer):
    """The critic would have to carry the news from letter to letter first."""
    first, last = learn(make_trainer, advantage__gae_lambda=0.0)
    assert first < 0.2 and last < 0.3


@pytest.mark.slow
def test_nothing_is_learned_at_learning_rate_zero(make_trainer):
    first, last = learn(make_trainer, optimizer__lr=0.0, critic__lr=0.0, total_steps=4)
    assert first < 0.2 and last < 0.2


@pytest.mark.slow
def test_nothing_is_learned_from_shuffled_rewards(make_trainer):
    first, last = learn(make_trainer, reward=shuffled)
    assert first < 0.2 and last < 0.3
