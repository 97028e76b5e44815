"""The split into minibatches and micro-batches: everything once, within budget, repeatable."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fastppo.plan import plan_epochs, split_microbatches


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 8), st.integers(1, 60), st.integers(0, 3))
def test_every_sequence_once_and_within_budget(lengths, num_minibatches, max_tokens, seed):
    plan = plan_epochs(lengths, epochs=2, num_minibatches=num_minibatches, max_tokens=max_tokens, seed=seed)
    for epoch in plan:
        assert sorted(i for minibatch in epoch for micro in minibatch for i in micro) == list(range(len(lengths)))
        assert len(epoch) == min(num_minibatches, len(lengths))
        sizes = [sum(map(len, minibatch)) for minibatch in epoch]
        assert max(sizes) - min(sizes) <= 1
        for micro in (micro for minibatch in epoch for micro in minibatch):
            assert sum(lengths[i] for i in micro) <= max_tokens or len(micro) == 1


def test_plan_depends_on_its_arguments_alone():
    lengths = list(range(1, 20))
    arguments = {"epochs": 2, "num_minibatches": 3, "max_tokens": 30}
    torch.manual_seed(1)
    first = plan_epochs(lengths, seed=5, **arguments)
    torch.manual_seed(2)
    assert plan_epochs(lengths, seed=5, **arguments) == first
    assert plan_epochs(lengths, seed=6, **arguments) != first
    assert first[0] != first[1], "each epoch has an order of its own"


def test_a_sequence_longer_than_the_budget_stands_alone():
    assert split_microbatches([0, 1, 2], [5, 100, 6], 12) == [[1], [2, 0]]
