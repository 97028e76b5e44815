"""Rollout: the packed batch and its sub-batches."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastppo.rollout import FinishReason, Rollout

TOKEN_FIELDS = [
    "logprobs",
    "processed_logprobs",
    "old_logprobs",
    "ref_logprobs",
    "values",
    "rewards",
    "advantages",
    "returns",
]


def _rollout(**changes) -> Rollout:
    """Four sequences: prompt 2 + 3 new, prompt 1 + 1, prompt 2 + none, prompt 1 + 4 of which two (a tool's) are not actions."""
    action = [0, 0, 1, 1, 1] + [0, 1] + [0, 0] + [0, 1, 0, 0, 1]
    action_mask = torch.tensor(action, dtype=torch.bool)
    total = len(action)
    fields = dict(
        tokens=torch.arange(100, 100 + total),
        cu_seqlens=torch.tensor([0, 5, 7, 9, 14], dtype=torch.int32),
        position_ids=torch.tensor([0, 1, 2, 3, 4, 0, 1, 0, 1, 0, 1, 2, 3, 4]),
        action_mask=action_mask,
        finish_reasons=torch.tensor([0, 1, 2, 0], dtype=torch.int8),
        prompt_index=torch.tensor([0, 0, 1, 1]),
        temperature=0.7,
        scores=torch.tensor([1.0, 2.0, torch.nan, 4.0]),
    )
    fields |= {name: torch.arange(total) + 1000.0 * (i + 1) for i, name in enumerate(TOKEN_FIELDS)}
    return Rollout(**{**fields, **changes})


def test_lengths():
    rollout = _rollout()
    assert (rollout.num_sequences, rollout.num_tokens) == (4, 14)
    assert rollout.lengths.tolist() == [5, 2, 2, 5]
    assert rollout.prompt_lengths.tolist() == [2, 1, 2, 1]
    assert rollout.completion_lengths.tolist() == [3, 1, 0, 4]
    assert rollout.last_action.tolist() == [4, 6, -1, 13]
    assert rollout.sequence_ids().tolist() == [0] * 5 + [1] * 2 + [2] * 2 + [3] * 5


def test_token_lists():
    rollout = _rollout()
    assert rollout.prompts() == [[100, 101], [105], [107, 108], [109]]
    assert rollout.completions() == [[102, 103, 104], [106], [], [110, 111, 112, 113]]


def test_finish_reasons_are_integers():
    assert [FinishReason(i).name for i in _rollout().finish_reasons.tolist()] == ["STOP", "LENGTH", "ERROR", "STOP"]


@pytest.mark.parametrize(
    "indices", [[3, 0, 0], torch.tensor([1]), torch.tensor([True, False, False, True]), [], range(4)]
)
def test_select_carries_every_tensor(indices):
    rollout = _rollout()
    chosen = torch.as_tensor(indices)
    chosen = (chosen.nonzero().squeeze(1) if chosen.dtype == torch.bool else chosen).tolist()
    part = rollout.select(indices)
    assert part.num_sequences == len(chosen) and part.temperature == 0.7
    assert part.completions() == [rollout.completions()[int(i)] for i in chosen]
    spans = [range(*rollout.cu_seqlens.tolist()[int(i) : int(i) + 2]) for i in chosen]
    places = [place for span in spans for place in span]
    for field in dataclasses.fields(Rollout):
        value, kept = getattr(rollout, field.name), getattr(part, field.name)
        if field.name not in ("cu_seqlens", "temperature"):
            expected = value[places if len(value) == 14 else chosen]
            torch.testing.assert_close(kept, expected, rtol=0, atol=0, equal_nan=True)
    assert part.cu_seqlens.dtype == torch.int32 and part.lengths.tolist() == [len(span) for span in spans]


def test_cat_undoes_select():
    rollout = _rollout()
    joined = Rollout.cat([rollout.select([0, 1]), rollout.select([]), rollout.select([2, 3])])
    for field in dataclasses.fields(Rollout):
        if field.name != "temperature":
            found, expected = getattr(joined, field.name), getattr(rollout, field.name)
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_cat_errors():
    with pytest.raises(ValueError, match="rollouts is empty"):
        Rollout.cat([])
    with pytest.raises(ValueError, match="temperature"):
        Rollout.cat([_rollout(), _rollout(temperature=1.0)])
    with pytest.raises(ValueError, match="values"):
        Rollout.cat([_rollout(), _rollout(values=None)])


def test_to_moves_every_tensor():
    moved = _rollout(values=None).to("meta")
    tensors = [getattr(moved, field.name) for field in dataclasses.fields(Rollout) if field.name != "temperature"]
    assert {tensor.device.type for tensor in tensors if tensor is not None} == {"meta"}


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("tokens", torch.zeros(14), TypeError),
        ("position_ids", torch.zeros(13, dtype=torch.int64), ValueError),
        ("action_mask", torch.zeros(14, dtype=torch.int64), TypeError),
        ("logprobs", None, TypeError),
        ("finish_reasons", torch.zeros(3, dtype=torch.int8), ValueError),
        ("scores", torch.zeros(14), ValueError),
        ("values", torch.zeros(4), ValueError),
        ("values", [0.0] * 14, TypeError),
        ("cu_seqlens", torch.zeros(0, dtype=torch.int32), ValueError),
    ],
)
def test_errors_name_the_field(name, value, error):
    with pytest.raises(error, match=rf"^{name}"):
        _rollout(**{name: value})
