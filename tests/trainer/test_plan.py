"""The split into minibatches and micro-batches: everything once, within budget, repeatable."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fastppo.plan import Lengths, plan_epochs, split_groups_warning, split_microbatches


def of_lengths(lengths: list[int]) -> Lengths:
    """Sequences that share nothing."""
    return Lengths(lengths, [1] * len(lengths), range(len(lengths)))


def tokens_run(microbatch: list[int], lengths: Lengths) -> int:
    """Each prompt's tokens once."""
    prompts = {lengths.groups[i]: lengths.prompts[i] for i in microbatch}
    return sum(prompts.values()) + sum(lengths.sequences[i] - lengths.prompts[i] for i in microbatch)


@st.composite
def many_lengths(draw) -> Lengths:
    """Groups of a prompt, in any order, some of them of one sample."""
    prompts = draw(st.lists(st.integers(1, 30), min_size=1, max_size=12))
    groups = draw(st.lists(st.integers(0, len(prompts) - 1), min_size=1, max_size=40))
    own = [prompts[group] for group in groups]
    return Lengths([prompt + draw(st.integers(0, 20)) for prompt in own], own, groups)


@given(many_lengths(), st.integers(1, 8), st.integers(1, 60), st.integers(0, 3))
def test_every_sequence_once_and_within_budget(lengths, num_minibatches, max_tokens, seed):
    count = len(lengths.sequences)
    plan = plan_epochs(lengths, epochs=2, num_minibatches=num_minibatches, max_tokens=max_tokens, seed=seed)
    for epoch in plan:
        assert sorted(i for minibatch in epoch for micro in minibatch for i in micro) == list(range(count))
        assert len(epoch) == min(num_minibatches, count)
        sizes = [sum(map(len, minibatch)) for minibatch in epoch]
        assert max(sizes) - min(sizes) <= 1
        for micro in (micro for minibatch in epoch for micro in minibatch):
            assert tokens_run(micro, lengths) <= max_tokens or len(micro) == 1


@given(many_lengths(), st.integers(1, 8), st.integers(0, 3))
def test_the_samples_of_a_prompt_stay_together(lengths, num_minibatches, seed):
    """But for one group at each border between two minibatches; and without a budget in one micro-batch."""
    epoch = plan_epochs(lengths, epochs=1, num_minibatches=num_minibatches, max_tokens=1 << 30, seed=seed)[0]
    assert all(len(minibatch) == 1 for minibatch in epoch)
    homes = {group: sum(any(lengths.groups[i] == group for i in part[0]) for part in epoch) for group in lengths.groups}
    assert sum(count - 1 for count in homes.values()) <= len(epoch) - 1


def test_plan_depends_on_its_arguments_alone():
    lengths = of_lengths(list(range(1, 20)))
    arguments = {"epochs": 2, "num_minibatches": 3, "max_tokens": 30}
    torch.manual_seed(1)
    first = plan_epochs(lengths, seed=5, **arguments)
    torch.manual_seed(2)
    assert plan_epochs(lengths, seed=5, **arguments) == first
    assert plan_epochs(lengths, seed=6, **arguments) != first
    assert first[0] != first[1], "each epoch has an order of its own"


def test_a_sequence_longer_than_the_budget_stands_alone():
    assert split_microbatches([0, 1, 2], of_lengths([5, 100, 6]), 12) == [[1], [2, 0]]


def test_a_group_that_does_not_fit_goes_on_with_its_prompt_once_more():
    """Prompt of 10, suffixes of 4, 3, 2, 1 and a sequence of 5: 10 + 4 + 3, then 10 + 2 + 1 + 5 = 18."""
    lengths = Lengths([11, 12, 13, 14, 5], [10, 10, 10, 10, 1], [0, 0, 0, 0, 1])
    assert split_microbatches(range(5), lengths, 18) == [[3, 2], [1, 0, 4]]


def test_a_budget_that_keeps_samples_apart_is_said():
    lengths = Lengths([11, 12, 13, 14, 50], [10, 10, 10, 10, 1], [0, 0, 0, 0, 1])
    assert "learner.tokens_per_microbatch = 19 tokens" in split_groups_warning(lengths, 19)
    assert split_groups_warning(lengths, 20) is None
