"""A value head that says a histogram over bins instead of a number: its value is the mean, its loss the cross-entropy with a return's histogram.

C bins whose centres lie evenly from the lowest to the highest value. Farebrother et al. 2024, "Stop Regressing", arXiv:2403.03950.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastppo.ops import batch_invariant_linear
from fastppo.ops._backends import choose

# Standard deviation of HL-Gauss's normal distribution, in bins.
SIGMA = 0.75


class Histogram(NamedTuple):
    """Which bins there are, and how a return becomes a distribution over them."""

    kind: Literal["two-hot", "hl-gauss"]
    bins: int
    low: float
    """Centre of the first bin."""
    high: float
    """Centre of the last."""

    def centres(self, like: Tensor) -> Tensor:
        """[C], in the type and on the device of `like`."""
        return torch.linspace(self.low, self.high, self.bins, dtype=like.dtype, device=like.device)

    def holds(self, returns: Tensor) -> Tensor:
        """bool, 0-d: whether every return is within the range."""
        return ((returns >= self.low) & (returns <= self.high)).all()

    def of(self, returns: Tensor) -> Tensor:
        """[N] -> [N, C] in fp64: each return's distribution; one beyond the range is taken for the range's end.

        two-hot   the share of the two bins beside it, so that the mean is the return
        hl-gauss  of N(return, (0.75 w)²) what falls into each bin, over what falls into all; bins of width w around their centres
        """
        returns = returns.detach().double().clamp(self.low, self.high)
        width = (self.high - self.low) / (self.bins - 1)
        if self.kind == "two-hot":
            place = (returns - self.low) / width
            below = place.floor().clamp(max=self.bins - 2)
            shares = torch.stack([1 - (place - below), place - below], dim=-1)
            found = shares.new_zeros(len(returns), self.bins)
            return found.scatter(1, torch.stack([below, below + 1], dim=-1).long(), shares)
        edges = self.low + width * (torch.arange(self.bins + 1, dtype=torch.float64, device=returns.device) - 0.5)
        below = torch.special.ndtr((edges - returns[:, None]) / (SIGMA * width))
        return below.diff(dim=-1) / (below[:, -1:] - below[:, :1])


class HistogramHead(nn.Module):
    """Linear(H, C) in fp32, zero at the start: every bin is as likely, and the first values are the middle of the range."""

    def __init__(self, hidden_size: int, histogram: Histogram, *, device: torch.device | None = None) -> None:
        super().__init__()
        self.histogram = histogram
        self.weight = nn.Parameter(torch.zeros(histogram.bins, hidden_size, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros(histogram.bins, dtype=torch.float32, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [T, H] -> values fp32 [T] (fp64 for an fp64 head), constants. On a CPU in fp32 their bits do not depend on the other rows."""
        return self.mean(self.logits(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [T, H] -> [T, C], differentiable."""
        if hidden.dtype == self.weight.dtype and choose("batch_invariant_linear", hidden) == "cpu":
            return _BatchInvariantLogits.apply(hidden, self.weight, self.bias)
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return F.linear(hidden.to(wide), self.weight.to(wide), self.bias.to(wide))

    @torch.no_grad()
    def mean(self, logits: Tensor) -> Tensor:
        """[T, C] -> [T]: the mean of each histogram, Σ softmax(logits)_c centre_c."""
        return batch_invariant_linear(logits.softmax(-1), self.histogram.centres(logits)[None]).squeeze(-1)

    def cross_entropy(self, logits: Tensor, returns: Tensor) -> Tensor:
        """logits [N, C], returns [N] -> [N]: -Σ p_c log softmax(logits)_c, where p is the return's distribution."""
        return -(self.histogram.of(returns).to(logits.dtype) * logits.log_softmax(-1)).sum(-1)


class _BatchInvariantLogits(torch.autograd.Function):
    """hidden [T, H], weight [C, H], bias [C] -> [T, C]"""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return batch_invariant_linear(hidden, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logits: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        d_hidden = d_logits @ weight if ctx.needs_input_grad[0] else None
        return d_hidden, d_logits.t() @ hidden, d_logits.sum(0)
