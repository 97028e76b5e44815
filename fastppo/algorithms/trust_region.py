"""A step within a trust region (Schulman et al. 2015, arXiv:1502.05477, appendix C), whatever the policy: along the natural gradient as far as the KL
limit lets it be, cut back until the KL that is measured keeps within the limit and the surrogate has grown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.config import TRPOConfig


class Comparison(NamedTuple):
    """Of the policy as it is with the one before the step."""

    kl: float
    """KL(old || new), the mean over the states, of whole distributions."""
    surrogate: float
    """The mean of ratio times advantage over the actions."""
    old_entropy: float


Dot = Callable[[Tensor, Tensor], Tensor]
"""The scalar product, 0-d, of two vectors; of their parts on all ranks, where each rank has a part."""


def longest_step(
    fisher_vector: Callable[[Tensor], Tensor], gradient: Tensor, config: TRPOConfig, dot: Dot = torch.dot
) -> Tensor:
    """[P]: along the natural gradient, with step^T F step / 2 = max_kl; zeros where the gradient is 0."""
    settings = {"iterations": config.cg_iterations, "damping": config.cg_damping}
    direction, curvature = natural_gradient(fisher_vector, gradient, **settings, dot=dot)
    return direction * math.sqrt(2 * config.max_kl / curvature) if curvature > 0 else torch.zeros_like(direction)


def line_search(
    move_and_compare: Callable[[Tensor], Comparison],
    step: Tensor,
    before: float,
    config: TRPOConfig,
    dot: Dot = torch.dot,
) -> tuple[float, Comparison]:
    """(share of the step that was taken, comparison there): the longest tried that keeps the limit with a surrogate above `before`.

    `move_and_compare` sets the weights to what they were before the step plus what it is given. Where nothing will do, that is 0: no step.
    """
    share = 1.0
    for _ in range(config.line_search_steps if dot(step, step) > 0 else 0):
        found = move_and_compare(share * step)
        if found.kl <= config.max_kl and found.surrogate > before:
            return share, found
        share *= config.line_search_factor
    return 0.0, move_and_compare(torch.zeros_like(step))


def natural_gradient(
    fisher_vector: Callable[[Tensor], Tensor],
    gradient: Tensor,
    *,
    iterations: int,
    damping: float,
    dot: Dot = torch.dot,
) -> tuple[Tensor, float]:
    """(x, x^T F x) with x near (F + damping I)^-1 gradient, by at most `iterations` conjugate gradients (Hestenes and Stiefel 1952)."""
    x, residual = torch.zeros_like(gradient), gradient.clone()
    p, squared = residual, dot(residual, residual)
    enough = squared * torch.finfo(gradient.dtype).eps
    for _ in range(iterations):
        if not squared > enough:
            break
        product = fisher_vector(p) + damping * p
        along = squared / dot(p, product)
        x, residual = x + along * p, residual - along * product
        before, squared = squared, dot(residual, residual)
        p = residual + squared / before * p
    curvature = dot(x, gradient - residual) - damping * dot(x, x)
    return x, curvature.item()


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])
