"""Prompts that are always or never solved come less often, in an order that the seed decides, and the pools go on after a resume."""

from __future__ import annotations

import json
import math
import random
from collections import Counter

import pytest
import torch

from fastppo.data import PromptSampler
from fastppo.data.difficulty import DifficultyPools
from fastppo.evaluation_config import DifficultyConfig

PROMPTS, BATCH, SAMPLES = 300, 30, 8
CHANCES = [0.0, 1.0, 0.5]  # of the prompts in turn: never solved, always solved, sometimes


def make_sampler(seed: int, **settings) -> PromptSampler:
    return PromptSampler(PROMPTS, BATCH, seed, DifficultyPools(DifficultyConfig(**settings), PROMPTS))


def step(sampler: PromptSampler, luck: random.Random) -> list[int]:
    """Draw a batch and sample for it: the prompts that were drawn."""
    drawn = sampler.next()
    places = torch.arange(BATCH).repeat_interleave(SAMPLES)
    scores = [float(luck.random() < CHANCES[index % 3]) for index in drawn for _ in range(SAMPLES)]
    sampler.saw(places, torch.tensor(scores), 1.0)
    return drawn


def drawn_kinds(seed: int, steps: range, **settings) -> Counter:
    """How often a prompt of each kind was drawn in these steps."""
    sampler, luck = make_sampler(seed, **settings), random.Random(seed)
    batches = [step(sampler, luck) for _ in range(steps.stop)]
    return Counter(index % 3 for batch in batches[steps.start :] for index in batch)


@pytest.mark.parametrize("seed", range(3))
def test_pools_raise_the_share_of_prompts_with_signal(seed):
    """After an epoch each prompt has been judged. Without weights a third of the prompts have signal; with a weight w on the two other thirds
    1 / (1 + 2w) have, and that is what is found, within five standard deviations of as many independent draws."""
    steps = range(PROMPTS // BATCH, 20 * PROMPTS // BATCH)
    count = len(steps) * BATCH
    for weight in (1.0, 0.5, 0.1):
        kinds = drawn_kinds(seed, steps, easy_weight=weight, hard_weight=weight)
        expected = 1 / (1 + 2 * weight)
        spread = math.sqrt(expected * (1 - expected) / count)
        assert abs(kinds[2] / count - expected) < 5 * spread, weight


def test_each_pool_has_a_weight_of_its_own():
    steps = range(PROMPTS // BATCH, 20 * PROMPTS // BATCH)
    kinds = drawn_kinds(0, steps, easy_weight=0.1, hard_weight=1.0)
    assert kinds[1] < 0.2 * kinds[0] and 0.9 < kinds[0] / kinds[2] < 1.1


def test_weights_of_one_change_nothing():
    """Nor does it matter what was seen: the order is that without pools."""
    plain, pooled, luck = PromptSampler(PROMPTS, BATCH, 5), make_sampler(5), random.Random(0)
    assert [plain.next() for _ in range(40)] == [step(pooled, luck) for _ in range(40)]
    assert PromptSampler(PROMPTS, BATCH, 5).state_dict().keys() == {"epoch", "cursor", "dataset_len", "seed"}


def test_the_seed_decides_the_order():
    orders = []
    for seed in (0, 0, 1):
        sampler, luck = make_sampler(seed, easy_weight=0.2, hard_weight=0.2), random.Random(7)
        orders.append([step(sampler, luck) for _ in range(40)])
    assert orders[0] == orders[1] != orders[2]


def test_every_prompt_comes_again():
    """Also where the weight is the smallest and every prompt is never solved: batches are full, and none is given up for good."""
    sampler = PromptSampler(6, 4, 0, DifficultyPools(DifficultyConfig(hard_weight=0.01, min_samples=1), 6))
    drawn = Counter()
    for _ in range(50):
        batch = sampler.next()
        assert len(batch) == 4
        sampler.saw(torch.arange(4), torch.zeros(4), 1.0)
        drawn.update(batch)
    assert drawn.keys() == set(range(6))


@pytest.mark.parametrize("steps", [0, 1, 15, 40])
def test_a_resumed_sampler_goes_on(steps):
    settings = {"easy_weight": 0.2, "hard_weight": 0.3, "min_samples": 12}
    original, resumed = make_sampler(3, **settings), make_sampler(3, **settings)
    luck = random.Random(1)
    for _ in range(steps):
        step(original, luck)
    state = original.state_dict()
    text = json.dumps(state)
    rest, again = random.Random(2), random.Random(2)
    expected = [step(original, rest) for _ in range(30)]
    assert json.dumps(state) == text, "a state is of its moment"
    resumed.load_state_dict(json.loads(text))
    assert [step(resumed, again) for _ in range(30)] == expected
    assert resumed.pools.metrics() == original.pools.metrics()


def test_pools_may_be_switched_on_and_off_between():
    plain, pooled = PromptSampler(PROMPTS, BATCH, 3), make_sampler(3, hard_weight=0.5)
    plain.next()
    pooled.load_state_dict(plain.state_dict())
    step(pooled, random.Random(0))
    plain.load_state_dict(pooled.state_dict())
    assert len(plain.next()) == BATCH


def test_which_pool_a_prompt_is_in():
    """By its latest completions: as many whole steps as it takes for `min_samples`."""
    pools = DifficultyPools(DifficultyConfig(min_samples=6, easy_rate=0.75, hard_rate=0.25), 4)
    assert pools.pool(0) == "unknown" and pools.solve_rate(0) is None
    pools.saw(0, 4, 4)
    assert pools.pool(0) == "unknown"
    pools.saw(0, 3, 4)
    assert (pools.pool(0), pools.solve_rate(0)) == ("easy", 7 / 8)
    pools.saw(0, 0, 4)
    assert (pools.pool(0), pools.solve_rate(0)) == ("mid", 3 / 8)
    pools.saw(0, 0, 0)  # no valid score says nothing
    assert pools.solve_rate(0) == 3 / 8
    pools.saw(0, 2, 4)
    assert (pools.pool(0), pools.solve_rate(0)) == ("hard", 2 / 8)
    pools.saw(1, 9, 9)
    assert pools.metrics() == {"difficulty/easy": 1 / 4, "difficulty/mid": 0, "difficulty/hard": 1 / 4}


def test_completions_without_a_valid_score_are_not_seen():
    sampler = PromptSampler(1, 1, 0, DifficultyPools(DifficultyConfig(hard_weight=0.5, min_samples=2), 1))
    sampler.next()
    sampler.saw(torch.tensor([0, 0]), torch.tensor([0.0, math.nan]), 1.0)
    assert sampler.pools.pool(0) == "unknown"
    sampler.saw(torch.tensor([0, 0]), torch.tensor([math.nan, 0.0]), 1.0)
    assert sampler.pools.pool(0) == "hard"
