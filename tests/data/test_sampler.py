"""The order in which prompts are drawn: every one once an epoch, and the same again after a resume."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from fastppo.data import PromptSampler


def draw(sampler, count):
    return [sampler.next() for _ in range(count)]


@pytest.mark.parametrize(("size", "batch"), [(10, 3), (10, 10), (3, 7), (1, 4), (64, 16)])
def test_every_prompt_comes_once_an_epoch(size, batch):
    stream = sum(draw(PromptSampler(size, batch, seed=1), 5 * size), [])
    assert all(len(drawn) == batch for drawn in draw(PromptSampler(size, batch, seed=1), 20))
    for start in range(0, len(stream) - size + 1, size):
        assert sorted(stream[start : start + size]) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own():
    first, second = draw(PromptSampler(50, 50, seed=0), 2)
    (other,) = draw(PromptSampler(50, 50, seed=1), 1)
    assert len({tuple(first), tuple(second), tuple(other), tuple(range(50))}) == 4
    assert draw(PromptSampler(50, 50, seed=0), 2) == [first, second]
    assert draw(PromptSampler(8, 8, seed=0), 1) == [[5, 0, 3, 6, 4, 7, 2, 1]], (
        "runs resume on other machines and Pythons"
    )


@pytest.mark.parametrize("drawn", [0, 1, 3, 4, 5, 9])
def test_resuming_goes_on_where_it_stopped(drawn):
    """verl#7401: resumed at an epoch's end, a trainer found nothing to do. 4 batches of 3 are exactly one epoch here."""
    original = PromptSampler(12, 3, seed=5)
    draw(original, drawn)
    resumed = PromptSampler(12, 3, seed=5)
    resumed.load_state_dict(json.loads(json.dumps(original.state_dict())))
    expected = draw(original, 10)
    assert draw(resumed, 10) == expected and Counter(sum(expected, [])).total() == 30


def test_resuming_with_another_batch_size():
    original, resumed = PromptSampler(12, 3, seed=5), PromptSampler(12, 4, seed=5)
    draw(original, 1)
    resumed.load_state_dict(original.state_dict())
    assert sum(draw(resumed, 3), []) == sum(draw(original, 4), [])


def test_a_state_of_another_run():
    state = PromptSampler(12, 3, seed=5).state_dict()
    with pytest.raises(ValueError, match="dataset_len 12, expected 13"):
        PromptSampler(13, 3, seed=5).load_state_dict(state)
    with pytest.raises(ValueError, match="seed 5, expected 6"):
        PromptSampler(12, 3, seed=6).load_state_dict(state)


@pytest.mark.parametrize("arguments", [(0, 1, 0), (1, 0, 0), (1, 1, -1), (1.0, 1, 0), (True, 1, 0)])
def test_wrong_sampler_arguments(arguments):
    with pytest.raises(ValueError, match="expected an integer"):
        PromptSampler(*arguments)
