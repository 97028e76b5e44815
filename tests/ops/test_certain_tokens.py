"""Rows in which one token has nearly all the probability: log p, 1 - p and the entropy keep their digits, however small they are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastppo import ops
from fastppo.ops import _head
from fastppo.reference import linear_ppo_loss, linear_token_logprobs, token_logprobs
from tests.cases import CERTAIN_WIDTHS, certain_rows
from tests.tolerance import assert_keeps_digits


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Several tiles of the head each way."""
    for name, sizes in _head.SIZES.items():
        monkeypatch.setitem(_head.SIZES, name, sizes._replace(tile_rows=16, tile_columns=1024, logits_bytes=2**16))


def head(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and a weight whose product is the logits to the bit, and whose gradient theirs."""
    return torch.eye(len(logits), dtype=logits.dtype), logits.T


def by_logits(module, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logprobs, entropy = module.token_logprobs(logits, labels, return_entropy=True)
    return (logprobs - entropy).sum(), logprobs, entropy


def by_head(module, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logprobs, entropy = module.linear_token_logprobs(*head(logits), labels, return_entropy=True)
    return (logprobs - entropy).sum(), logprobs, entropy


def by_loss(module, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    old_logprobs = token_logprobs.token_logprobs(logits.detach().double(), labels).to(torch.float32)
    columns = old_logprobs, torch.full_like(old_logprobs, -1.0)
    loss, _, logprobs, entropy = module.linear_ppo_loss(*head(logits), labels, *columns, entropy_coef=1.0)
    return loss, logprobs, entropy


# Of each op a loss that is log p - H or its like: their gradients have one sign, so that none is lost in the sum.
LOSSES = {
    "token_logprobs": (by_logits, token_logprobs),
    "linear_token_logprobs": (by_head, linear_token_logprobs),
    "linear_ppo_loss": (by_loss, linear_ppo_loss),
}


@pytest.mark.parametrize("width", CERTAIN_WIDTHS)
@pytest.mark.parametrize("op", LOSSES)
def test_log_probs_entropy_and_gradient(backend, op, width):
    (function, reference), (logits, labels) = LOSSES[op], certain_rows(width)
    results = []
    for module, dtype in ((ops, torch.float32), (reference, torch.float64)):
        leaf = logits.to(dtype).requires_grad_()
        loss, logprobs, entropy = function(module, leaf, labels)
        results.append((logprobs.detach(), entropy.detach(), torch.autograd.grad(loss, leaf)[0]))
    for name, ours, exact in zip(("log-probs", "entropy", "gradient"), *results, strict=True):
        assert_keeps_digits(ours, exact, name)


@pytest.mark.parametrize("margin", [5, 10, 15, 30, 60, 300])
def test_the_reference_itself(margin):
    """Two logits have a closed form."""
    odds = math.exp(-margin)
    logits = torch.tensor([[margin, 0.0]], dtype=torch.float64, requires_grad=True)
    logprobs, entropy = token_logprobs.token_logprobs(logits, torch.tensor([0]), return_entropy=True)
    (grad,) = torch.autograd.grad(logprobs, logits)
    exact = -math.log1p(odds), math.log1p(odds) + margin * odds / (1 + odds), odds / (1 + odds)
    for name, ours, value in zip(
        ("log-prob", "entropy", "gradient"), (logprobs, entropy, grad[:, 0]), exact, strict=True
    ):
        assert_keeps_digits(ours.detach(), torch.tensor([value], dtype=torch.float64), name)
