"""Offsets of packed sequences: wrong ones are refused by every op that takes them, whether or not it has to look at them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastppo import native
from fastppo.ops import gae, kl_shaped_rewards, linear_ppo_loss, ppo_loss
from fastppo.ops._backends import FAST_BACKENDS

TOTAL = 6
TOKENS, LABELS = torch.zeros(TOTAL), torch.zeros(TOTAL, dtype=torch.long)
HIDDEN, WEIGHT, MASK = torch.zeros(TOTAL, 2), torch.zeros(3, 2), torch.ones(TOTAL, dtype=torch.bool)
# Whose sums need no sequences.
WITHOUT_SEQUENCES = {
    "token-mean": {},
    "fixed-denominator": {"aggregation": "fixed-denominator", "denominator": 3.0},
    "given denominator": {"aggregation": "seq-mean-token-sum", "denominator": 3.0},
}
Call = Callable[[Tensor], object]


def calls() -> dict[str, Call]:
    made: dict[str, Call] = {
        "gae": lambda offsets: gae(TOKENS, TOKENS, gamma=0.9, lam=0.9, cu_seqlens=offsets),
        "approx_kl: kl_shaped_rewards": lambda offsets: kl_shaped_rewards(
            torch.zeros(max(offsets.numel() - 1, 0)), TOKENS, TOKENS, MASK, coef=0.1, cu_seqlens=offsets
        ),
    }
    for name, options in WITHOUT_SEQUENCES.items():
        made[f"ppo_loss: {name}"] = lambda offsets, options=options: ppo_loss(
            TOKENS, TOKENS, TOKENS, cu_seqlens=offsets, **options
        )
        made[f"linear_ppo_loss: {name}"] = lambda offsets, options=options: linear_ppo_loss(
            HIDDEN, WEIGHT, LABELS, TOKENS, TOKENS, cu_seqlens=offsets, **options
        )
    return made


CALLS = calls()
WRONG = {
    "first not 0": ([1, 6], "holds 1 at position 0"),
    "first negative": ([-1, 6], "holds -1 at position 0"),
    "beyond the end": ([0, 7], "holds 7 at position 1"),
    "beyond the end, then back": ([0, 9, 6], "holds 9 at position 1"),
    "short of the end": ([0, 5], "holds 5 at position 1"),
    "falling": ([0, 4, 3, 6], "holds 3 at position 2"),
    "negative inside": ([0, -1, 6], "holds -1 at position 1"),
    "no sequence, yet tokens": ([0], "holds 0 at position 0"),
    "an end alone": ([6], "holds 6 at position 0"),
    "lengths, not offsets": ([2, 2, 2], "holds 2 at position 0"),
    "beyond 2^32": ([0, 2**32 + 6], "holds 4294967302 at position 1"),
}


@pytest.fixture
def call(request, backend) -> Call:
    op = request.param.split(":")[0]
    if backend not in ("reference", *FAST_BACKENDS[op]):
        pytest.skip(f"{op} has no {backend} kernel")
    return CALLS[request.param]


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("call", CALLS, indirect=True)
def test_wrong_offsets_are_refused(call, kind):
    offsets, message = torch.tensor(WRONG[kind][0]), WRONG[kind][1]
    if native.on_cuda(offsets):
        pytest.skip("the host does not wait for the device: NaN, as each op's own tests say")
    expected = "expected 0 first, no decrease and 6 .all tokens. last"
    with pytest.raises(ValueError, match=f"cu_seqlens {message}, {expected}"):
        call(offsets)


@pytest.mark.parametrize(
    ("offsets", "error"),
    [
        (torch.tensor([0.0, 6.0]), TypeError),
        (torch.tensor([False, True]), TypeError),
        (torch.tensor([[0, 6]]), ValueError),
        (torch.tensor(6), ValueError),
        (torch.zeros(0, dtype=torch.long), ValueError),
    ],
    ids=["floating", "bool", "of two dimensions", "of none", "empty"],
)
@pytest.mark.parametrize("call", CALLS, indirect=True)
def test_what_are_no_offsets_is_refused(call, offsets, error):
    with pytest.raises(error, match="cu_seqlens has"):
        call(offsets)


@pytest.mark.parametrize("call", CALLS, indirect=True)
def test_right_offsets_are_taken(call):
    for offsets in ([0, 6], [0, 0, 2, 6, 6]):
        for dtype in (torch.int32, torch.int64):
            call(torch.tensor(offsets, dtype=dtype))
