"""`ppo_loss` where no finite difference sees its gradient: at ties, at the bounds of clamps, through stop-gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastppo.ops import ppo_loss
from tests.tolerance import assert_rounds_to


def gradient_at(logprob: float, advantage: float, **options) -> Tensor:
    leaf = torch.tensor([logprob], requires_grad=True)
    ppo_loss(leaf, torch.zeros(1), torch.tensor([advantage]), **options).loss.backward()
    return leaf.grad[0]


def test_policy_ties(backend):
    """At ratio 1 with an empty clip range both losses are equal: the gradient is the unclipped one's, whole."""
    for advantage in (2.0, -2.0):
        assert gradient_at(0.0, advantage, clip_low=0.0, clip_high=0.0) == -advantage
    assert gradient_at(0.0, 0.0) == 0
    assert gradient_at(0.5, 1.0) == 0 and gradient_at(-0.5, -1.0) == 0  # clipped
    assert gradient_at(-0.5, 1.0) < 0 and gradient_at(0.5, -1.0) > 0  # pessimistic: beyond the range, yet not clipped


def test_log_ratio_bounds(backend):
    """The gradient flows at a log-ratio of exactly +-20 and stops beyond, as torch.clamp's does."""
    assert_rounds_to(gradient_at(20.0, -1.0), math.exp(20))
    assert gradient_at(20.5, -1.0) == 0
    assert_rounds_to(gradient_at(-20.0, 1.0), -math.exp(-20))
    assert gradient_at(-20.5, 1.0) == 0


def test_dual_clip_only_for_negative_advantages(backend):
    assert gradient_at(3.0, -1.0) > 0
    assert gradient_at(3.0, -1.0, dual_clip=3.0) == 0
    assert gradient_at(0.5, -1.0, dual_clip=3.0) == gradient_at(0.5, -1.0)
    leaf = torch.tensor([3.0, 3.0])
    loss, stats = ppo_loss(leaf, torch.zeros(2), torch.tensor([-1.0, 1.0]), dual_clip=3.0)
    assert_rounds_to(loss, (3.0 - 1.2) / 2)
    assert stats.clipfrac_dual == 0.5 and stats.clipfrac == 0.5


def test_value_ties(backend):
    """v = old, v exactly at old +- clip, and |v - R| = |clip(v) - R| are ties: the plain squared error's gradient."""
    values = torch.tensor([1.0, 1.5, 0.5, 2.0, 3.0], requires_grad=True)
    returns = torch.tensor([3.0, 4.0, -2.0, 1.75, 0.0])
    zeros = torch.zeros(5)
    loss, stats = ppo_loss(
        zeros, zeros, zeros, values=values, old_values=torch.ones(5), returns=returns, value_clip=0.5, vf_coef=5.0
    )
    loss.backward()
    assert values.grad.tolist() == [-2.0, -2.5, 2.5, 0.25, 3.0]
    assert stats.value_clipfrac == 0
    assert_rounds_to(stats.value_loss, 0.5 * (4 + 6.25 + 6.25 + 0.0625 + 9) / 5)


def test_value_clip_stops_the_gradient(backend):
    values = torch.tensor([2.0], requires_grad=True)
    one = torch.ones(1)
    loss, stats = ppo_loss(one, one, one, values=values, old_values=one, returns=torch.tensor([2.5]), value_clip=0.5)
    loss.backward()
    assert values.grad.item() == 0 and stats.value_clipfrac == 1
    assert stats.value_loss == 0.5


def test_kl_ties(backend):
    """At logprob = ref all estimators but k1 are flat (abs: torch's choice). Only k3 is clamped; at the bound it flows."""
    at_tie = {"k1": 1.0, "k2": 0.0, "k3": 0.0, "abs": 0.0, "k1+": 0.0, "k3+": 0.0}
    far_below = {"k1": 1.0, "k2": -30.0, "k3": 0.0, "abs": -1.0, "k1+": -30.0, "k3+": -30.0}
    for kind in at_tie:
        options = {"kl_coef": 1.0, "kl_kind": kind}
        assert gradient_at(0.0, 0.0, ref_logprobs=torch.zeros(1), **options) == at_tie[kind], kind
        assert gradient_at(0.0, 0.0, ref_logprobs=torch.tensor([30.0]), **options) == far_below[kind], kind
    # k3 = exp(-x) - 1 + x reaches 10 at x = 11 - exp(-11) and between x = -2.6 and -2.7.
    for x, slope in ((10.9, 1 - math.exp(-10.9)), (11.1, 0.0), (-2.6, 1 - math.exp(2.6)), (-2.7, 0.0)):
        gradient = gradient_at(0.0, 0.0, ref_logprobs=torch.tensor([-x]), kl_coef=1.0)
        assert_rounds_to(gradient, slope, f"gradient at {x}")


def test_rollout_bounds_are_inclusive(backend):
    zero, advantages = torch.zeros(3), torch.tensor([1.0, 1.0, 1.0])
    rollout = torch.tensor([0.0, 1.0, -1.0])  # weights 1, 1/e, e
    kept = {"rollout_logprobs": rollout, "rollout_bounds": (1.0, 1.0)}
    loss, stats = ppo_loss(zero, zero, advantages, rollout_correction="mask", **kept)
    assert_rounds_to(loss, -1 / 3)
    assert_rounds_to(stats.rollout_clipfrac, 2 / 3)
    loss, stats = ppo_loss(zero, zero, advantages, rollout_correction="truncate", **kept)
    assert_rounds_to(loss, -(2 + math.exp(-1)) / 3)
    assert_rounds_to(stats.rollout_clipfrac, 1 / 3)
    loss, stats = ppo_loss(zero, zero, advantages, **kept)  # only measured
    assert loss == -1 and stats.rollout_clipfrac == 0
    assert_rounds_to(stats.rollout_weight_mean, (1 + math.exp(-1) + math.e) / 3)


def test_gspo_gradient_is_the_sequence_ratio_for_each_token(backend):
    """arXiv:2507.18071, eq. 13: d loss / d logprob_t = -A_t s_i / denominator where nothing is clipped."""
    old, advantages = torch.randn(3, 6), torch.randn(3, 6)
    logprobs = (old + 0.1 * torch.randn(3, 6)).requires_grad_()
    ppo_loss(logprobs, old, advantages, ratio_level="sequence", clip_low=1.0, clip_high=9.0).loss.backward()
    sequence_ratio = (logprobs - old).double().mean(1, keepdim=True).exp()
    assert_rounds_to(logprobs.grad, (-advantages * sequence_ratio / 18).detach())


def test_cispo_gradient_is_a_constant_weight(backend):
    """arXiv:2506.13585: tokens outside the clip range keep their gradient, with the clipped weight."""
    old, advantages = torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, -1.0])
    logprobs = torch.tensor([-1.0, 1.0, -1.0, 1.0], requires_grad=True)
    ppo_loss(logprobs, old, advantages, objective="cispo", clip_low=0.5, clip_high=0.5).loss.backward()
    assert torch.equal(logprobs.grad, torch.tensor([-0.5, -1.5, 0.5, 1.5]) / 4)
