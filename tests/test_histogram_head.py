"""Values that are said as histograms: their distributions and losses against plain formulas in fp64, and bits that no neighbour changes."""

from __future__ import annotations

import math

import pytest
import torch

from fastppo.model import Histogram, HistogramHead
from tests.tolerance import assert_as_exact_as_native, assert_rounds_to, assert_same_in_fp64

RANGES = [(2, 0.0, 1.0), (5, -1.0, 1.0), (101, 0.0, 1.0), (51, -20.0, 3.5)]
KINDS = ["two-hot", "hl-gauss"]


def plain_two_hot(value: float, bins: int, low: float, high: float) -> list[float]:
    """Of the two centres beside a value the nearer has the more."""
    width, value = (high - low) / (bins - 1), min(max(value, low), high)
    return [max(0.0, 1 - abs(value - (low + i * width)) / width) for i in range(bins)]


def plain_hl_gauss(value: float, bins: int, low: float, high: float) -> list[float]:
    """The normal distribution's mass between the edges of each bin, of all that is between the outermost ones."""
    width, value = (high - low) / (bins - 1), min(max(value, low), high)

    def below(edge: float) -> float:
        return 0.5 * math.erfc(-(edge - value) / (0.75 * width) / math.sqrt(2))

    edges = [low + (i - 0.5) * width for i in range(bins + 1)]
    return [
        (below(b) - below(a)) / (below(edges[-1]) - below(edges[0])) for a, b in zip(edges, edges[1:], strict=False)
    ]


PLAIN = {"two-hot": plain_two_hot, "hl-gauss": plain_hl_gauss}


def returns_in(low: float, high: float) -> torch.Tensor:
    """Ends, beyond them, in between."""
    inner = torch.rand(20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.cat(
        [torch.tensor([low, high, low - 1, high + 7, (low + high) / 2]).double(), low + (high - low) * inner]
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bins, low, high", RANGES)
def test_distributions_are_the_plain_formulas(kind, bins, low, high):
    returns = returns_in(low, high)
    expected = [PLAIN[kind](value, bins, low, high) for value in returns.tolist()]
    found = Histogram(kind, bins, low, high).of(returns)
    assert_same_in_fp64(found, torch.tensor(expected, dtype=torch.float64))
    assert_same_in_fp64(found.sum(-1), torch.ones(len(returns), dtype=torch.float64))


@pytest.mark.parametrize("bins, low, high", RANGES)
def test_the_mean_of_two_hot_is_the_return(bins, low, high):
    histogram, returns = Histogram("two-hot", bins, low, high), returns_in(low, high).clamp(low, high)
    assert_same_in_fp64(histogram.of(returns) @ histogram.centres(returns), returns)


def test_the_mean_of_hl_gauss_is_the_return_away_from_the_ends():
    histogram, returns = Histogram("hl-gauss", 101, 0.0, 1.0), torch.linspace(0.2, 0.8, 7).double()
    assert_rounds_to((histogram.of(returns) @ histogram.centres(returns)).float(), returns)


def head_of(kind: str, dtype=torch.float32) -> HistogramHead:
    head = HistogramHead(24, Histogram(kind, 7, -1.0, 2.0))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(3))
    return head.to(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_values_and_gradients_are_as_exact_as_plain_torch(kind):
    hidden, returns = torch.randn(13, 24), torch.linspace(-1.5, 2.5, 13)
    target = torch.tensor([PLAIN[kind](value, 7, -1.0, 2.0) for value in returns.tolist()], dtype=torch.float64)

    def plain(dtype) -> list[torch.Tensor]:
        x, head = hidden.to(dtype).requires_grad_(), head_of(kind, dtype)
        logits = x @ head.weight.t() + head.bias
        loss = -(target.to(dtype) * torch.log_softmax(logits, -1)).sum(-1)
        values = torch.softmax(logits, -1) @ torch.linspace(-1.0, 2.0, 7, dtype=dtype)
        return [loss, values, *torch.autograd.grad(loss.sum(), (x, head.weight, head.bias))]

    x, head = hidden.clone().requires_grad_(), head_of(kind)
    logits = head.logits(x)
    loss = head.cross_entropy(logits, returns)
    ours = [loss, head.mean(logits), *torch.autograd.grad(loss.sum(), (x, head.weight, head.bias))]
    for name, found, native, exact in zip(
        ("loss", "values", "d_hidden", "d_weight", "d_bias"),
        ours,
        plain(torch.float32),
        plain(torch.float64),
        strict=True,
    ):
        assert_as_exact_as_native(found, native, exact, name)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_the_other_rows(kind):
    head, hidden = head_of(kind), torch.randn(40, 24)
    together = head(hidden)
    for size in (1, 3, 17):
        assert torch.equal(torch.cat([head(part) for part in hidden.split(size)]), together)


def test_a_new_head_says_the_middle_and_draws_no_random_number():
    before = torch.get_rng_state()
    head = HistogramHead(8, Histogram("hl-gauss", 51, -1.0, 3.0))
    assert torch.equal(torch.get_rng_state(), before)
    assert_rounds_to(head(torch.randn(4, 8)), 1.0)


def test_no_return_beyond_the_range_goes_unseen():
    histogram = Histogram("two-hot", 3, 0.0, 1.0)
    assert histogram.holds(torch.tensor([0.0, 0.4, 1.0]))
    assert not histogram.holds(torch.tensor([0.0, 1.1])) and not histogram.holds(torch.tensor([-0.1, 1.0]))
    assert not histogram.holds(torch.tensor([torch.nan]))
