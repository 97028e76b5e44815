"""SamplingParams says which field is wrong and what it should be."""

from __future__ import annotations

import dataclasses

import pytest

from fastppo.rollout import SamplingParams


@pytest.mark.parametrize(
    "field, value, error",
    [
        ("n", 0, ValueError),
        ("n", True, TypeError),
        ("temperature", -0.1, ValueError),
        ("temperature", float("nan"), ValueError),
        ("temperature", "hot", TypeError),
        ("temperature", 1e-300, ValueError),
        ("temperature", 1e11, ValueError),
        ("top_k", -1, ValueError),
        ("top_k", 1.5, TypeError),
        ("top_p", 0.0, ValueError),
        ("top_p", 1.1, ValueError),
        ("min_p", -0.1, ValueError),
        ("min_p", 1.1, ValueError),
        ("max_new_tokens", 0, ValueError),
        ("min_new_tokens", -1, ValueError),
        ("min_new_tokens", 129, ValueError),
        ("stop_token_ids", 5, TypeError),
        ("stop_token_ids", (-5,), ValueError),
        ("stop_strings", "end", TypeError),
        ("stop_strings", ("",), ValueError),
        ("seed", -1, ValueError),
        ("seed", 2**63, ValueError),
    ],
)
def test_errors_name_the_field(field, value, error):
    with pytest.raises(error, match=rf"^{field}"):
        SamplingParams(**{field: value})


def test_lists_become_tuples_and_the_rest_is_frozen():
    params = SamplingParams(stop_token_ids=[1, 2], stop_strings=["a"], temperature=0)
    assert params.stop_token_ids == (1, 2) and params.stop_strings == ("a",)
    assert hash(params) == hash(dataclasses.replace(params))
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2
