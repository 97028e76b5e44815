"""Rollout: the packed batch, what is derived from it, and its sub-batches."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastppo.evaluation import Evaluation
from fastppo.rollout import FinishReason, Rollout
from tests.stand_in_gpu import DEVICE, stand_in_gpu
from tests.trainer.steps import moved

ACTIONS = [2, 3, 4, 6, 10, 13]
ACTION_BOUNDS = [0, 3, 4, 4, 6]


def _rollout(**changes) -> Rollout:
    """Four sequences: prompt 2 + 3 new, prompt 1 + 1, prompt 2 + none, prompt 1 + 4 of which two (a tool's) are not actions."""
    action_mask = torch.zeros(14, dtype=torch.bool)
    action_mask[ACTIONS] = True
    fields = dict(
        tokens=torch.arange(100, 114),
        cu_seqlens=torch.tensor([0, 5, 7, 9, 14], dtype=torch.int32),
        position_ids=torch.tensor([0, 1, 2, 3, 4, 0, 1, 0, 1, 0, 1, 2, 3, 4]),
        action_mask=action_mask,
        logprobs=torch.arange(6) + 1000.0,
        processed_logprobs=torch.arange(6) + 2000.0,
        finish_reasons=torch.tensor([0, 1, 2, 0], dtype=torch.int8),
        prompt_index=torch.tensor([0, 0, 1, 1]),
        temperature=0.7,
    )
    return Rollout(**{**fields, **changes})


def test_what_is_derived():
    rollout = _rollout()
    assert (rollout.num_sequences, rollout.num_tokens, rollout.num_actions) == (4, 14, 6)
    assert rollout.lengths == [5, 2, 2, 5] and rollout.bounds == [0, 5, 7, 9, 14]
    assert rollout.actions.tolist() == ACTIONS and rollout.action_bounds == ACTION_BOUNDS
    assert rollout.action_counts == [3, 1, 0, 2], "the tokens of a tool are no actions"
    assert rollout.action_cu_seqlens.tolist() == ACTION_BOUNDS and rollout.action_cu_seqlens.dtype == torch.int32
    assert rollout.prompt_lengths == [2, 1, 2, 1]


def test_token_lists():
    rollout = _rollout()
    assert rollout.prompts() == [[100, 101], [105], [107, 108], [109]]
    assert rollout.completions() == [[102, 103, 104], [106], [], [110, 111, 112, 113]]


def test_finish_reasons_are_integers():
    assert [FinishReason(i).name for i in _rollout().finish_reasons.tolist()] == ["STOP", "LENGTH", "ERROR", "STOP"]


def test_a_record_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        _rollout().temperature = 1.0


@pytest.mark.parametrize("place", [0, 5])
def test_a_sequence_cannot_begin_with_an_action(place):
    """hidden[place - 1], which would have to score it, is another sequence's, or wraps round to the last."""
    mask = _rollout().action_mask.clone()
    mask[place] = True
    with pytest.raises(ValueError, match=f"action_mask is True at place {place}"):
        _rollout(action_mask=mask, logprobs=torch.zeros(7), processed_logprobs=torch.zeros(7))


@pytest.mark.parametrize("indices", [[3, 0, 0], [1], [2], [], range(4)])
def test_select_is_what_would_have_been_made_of_those_sequences(indices):
    """Every tensor, and everything derived, is that of a rollout built from the chosen sequences."""
    rollout = _rollout()
    part = rollout.select(indices)
    tokens = [p for i in indices for p in range(*rollout.bounds[i : i + 2])]
    actions = [p for i in indices for p in range(*ACTION_BOUNDS[i : i + 2])]
    lengths = torch.tensor([rollout.lengths[i] for i in indices], dtype=torch.int32)
    built = Rollout(
        **{name: getattr(rollout, name)[tokens] for name in ("tokens", "position_ids", "action_mask")},
        **{name: getattr(rollout, name)[actions] for name in ("logprobs", "processed_logprobs")},
        **{name: getattr(rollout, name)[list(indices)] for name in ("finish_reasons", "prompt_index")},
        cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int(),
        temperature=0.7,
    )
    for field in dataclasses.fields(Rollout):
        found, expected = getattr(part, field.name), getattr(built, field.name)
        assert torch.equal(found, expected) if isinstance(found, torch.Tensor) else found == expected, field.name
    assert (part.bounds, part.action_bounds) == (built.bounds, built.action_bounds)
    assert torch.equal(part.actions, built.actions) and torch.equal(part.action_cu_seqlens, built.action_cu_seqlens)


def test_records_of_actions_take_the_same_sequences():
    evaluation = Evaluation(ACTION_BOUNDS, logprobs=torch.arange(6.0), final_values=torch.arange(4.0))
    part = evaluation.select([3, 0])
    assert part.logprobs.tolist() == [4, 5, 0, 1, 2] and part.final_values.tolist() == [3, 0]
    assert part.action_bounds == [0, 2, 5] and part.values is None
    with pytest.raises(ValueError, match=r"values has shape \[4\], expected \[6\]"):
        Evaluation(ACTION_BOUNDS, values=torch.zeros(4))


def test_what_a_search_found_is_known_by_its_place():
    assert _rollout().sampled == [0, 1, 2, 3]
    rollout = _rollout(found=torch.tensor([False, True, True, False]))
    assert rollout.sampled == [0, 3] and rollout.select([2, 0, 1]).found.tolist() == [True, False, True]
    both = Rollout.joined([rollout, rollout.select([1])], [0, 2])
    assert both.found.tolist() == [False, True, True, False, True] and both.prompt_index.tolist() == [0, 0, 1, 1, 0]
    with pytest.raises(ValueError, match=r"^found has shape \[2\], expected \[4\]"):
        _rollout(found=torch.zeros(2, dtype=torch.bool))


def test_taking_sequences_waits_for_nothing():
    """Numbers that the host has been told once; `tests/trainer/test_waiting.py` watches a whole update."""
    rollout = moved(_rollout(), DEVICE)
    evaluation = Evaluation(rollout.action_bounds, logprobs=torch.zeros(6, device=DEVICE))
    with stand_in_gpu() as gpu:
        part = rollout.select([3, 1])
        assert len(part.actions) == part.num_actions == len(evaluation.select([3, 1]).logprobs)
        assert part.action_cu_seqlens.shape == (3,) and part.lengths == [5, 2]
    assert gpu.waits == []


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("tokens", torch.zeros(14), TypeError),
        ("position_ids", torch.zeros(13, dtype=torch.int64), ValueError),
        ("action_mask", torch.zeros(14, dtype=torch.int64), TypeError),
        ("logprobs", None, TypeError),
        ("logprobs", torch.zeros(14), ValueError),
        ("finish_reasons", torch.zeros(3, dtype=torch.int8), ValueError),
        ("cu_seqlens", torch.zeros(0, dtype=torch.int32), ValueError),
    ],
)
def test_errors_name_the_field(name, value, error):
    with pytest.raises(error, match=rf"^{name}"):
        _rollout(**{name: value})
