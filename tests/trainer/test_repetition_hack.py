"""A reward that likes one word best is maximised by nothing but that word; the repetition penalty beside it keeps the text varied."""

from __future__ import annotations

import pytest

from fastppo import PPOTrainer
from fastppo.console import Reporter
from fastppo.rewards import repetition
from tests.tiny import make_model, make_tokenizer
from tests.tiny_trainer import tiny_config
from tests.trainer.test_learning import SETTINGS

LENGTH = 8
MARKS = "!?.,;:&%$#@*+=<>"  # each of them is a word to `repetition`
LIKED = {"!": 1.0, "?": 0.9, ".": 0.8}


def enthusiasm(completions):
    """The mean over the marks of how much each is liked; chance is about 0.16."""
    return [sum(LIKED.get(mark, 0.0) for mark in text) / LENGTH for text in completions]


def repeated(completions):
    """The share of pairs of marks that repeat an earlier one, as a penalty."""
    return repetition(completions, n=2)


def learn(tmp_path, *rewards, **changes) -> tuple[float, float]:
    """(what is liked, the share of pairs that are repeated) of the completions of the last three steps."""
    found = []

    def watching(completions):
        found.append([sum(scores) / len(scores) for scores in (enthusiasm(completions), repeated(completions))])
        return [None] * len(completions)

    lengths = {"rollout__max_new_tokens": LENGTH, "rollout__min_new_tokens": LENGTH}
    config = tiny_config(tmp_path / "run", **SETTINGS | lengths | {"total_steps": 30} | changes)
    PPOTrainer(
        make_model(),
        reward=[*rewards, watching],
        prompts=["?", "."],
        config=config,
        tokenizer=make_tokenizer(MARKS),
        reporter=Reporter(config.total_steps, quiet=True),
    ).train()
    liked, penalty = (sum(values) / 3 for values in zip(*found[-3:], strict=True))
    return liked, -penalty


@pytest.mark.slow
def test_without_the_penalty_one_mark_is_repeated(tmp_path):
    liked, share = learn(tmp_path, enthusiasm)
    assert liked > 0.95 and share > 0.7


@pytest.mark.slow
def test_with_the_penalty_the_text_stays_varied_and_liked(tmp_path):
    liked, share = learn(tmp_path, enthusiasm, repeated)
    assert liked > 0.75 and share < 0.25


@pytest.mark.slow
def test_nothing_of_it_happens_at_learning_rate_zero(tmp_path):
    liked, share = learn(tmp_path, enthusiasm, optimizer__lr=0.0, critic__lr=0.0, total_steps=4)
    assert liked < 0.25 and share < 0.1
