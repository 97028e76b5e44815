"""Every estimator against its formula, written out sequence by sequence in fp64; ragged groups, groups of one, equal rewards."""

from __future__ import annotations

import pytest
import torch

from fastppo.algorithms.advantages import (
    against_group,
    generalised,
    group_advantages,
    length_adaptive_lambda,
    reinforce_plus_plus,
    remax,
    v_trace,
)
from fastppo.config import AdvantageConfig
from tests.tolerance import assert_rounds_to, assert_same_in_fp64

LENGTHS = [3, 1, 4, 2, 6, 1, 5]
GROUPS = [
    0,
    0,
    0,
    2,
    2,
    5,
    2,
]  # ragged: of three, of three more (not side by side), and one whose others had no valid score
BOUNDS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)


def random(seed: int, size: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def expected_advantage(estimator: str, index: int, rewards: list[float]) -> float:
    """The formula of one sequence, as its paper writes it."""
    group = [i for i in range(len(rewards)) if GROUPS[i] == GROUPS[index]]
    if len(group) == 1:
        return 0.0
    own, of_group = rewards[index], [rewards[i] for i in group]
    if estimator == "rloo":
        return own - mean([rewards[i] for i in group if i != index])
    if estimator == "opo":
        return own - sum(LENGTHS[i] * rewards[i] for i in group) / sum(LENGTHS[i] for i in group)
    above = own - mean(of_group)
    if estimator == "dr_grpo":
        return above
    variance = sum((reward - mean(of_group)) ** 2 for reward in of_group) / (len(group) - 1)
    return above / (variance**0.5 + 1e-6)


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo", "opo"])
def test_group_baselines(estimator):
    """A sequence's reward is that of all its actions, KL penalties among them, and all of them get its advantage."""
    rewards = random(0, sum(LENGTHS))
    totals = [part.sum().item() for part in rewards.split(LENGTHS)]
    found = against_group(rewards, torch.tensor(GROUPS), BOUNDS, estimator)
    expected = [expected_advantage(estimator, i, totals) for i in range(len(LENGTHS))]
    per_action = torch.tensor(expected, dtype=torch.float64).repeat_interleave(torch.tensor(LENGTHS))
    assert_same_in_fp64(found, per_action)
    assert_rounds_to(against_group(rewards.float(), torch.tensor(GROUPS), BOUNDS, estimator).float(), per_action)


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo", "opo"])
def test_equal_rewards_teach_nothing_at_all(estimator):
    """Not even their rounding, which GRPO would divide by a deviation of nearly 0: 0.1 added up is not a multiple of 0.1."""
    rewards = torch.tensor([0.1, 0.7, 1 / 3]).repeat(7)
    groups, lengths = torch.arange(3).repeat(7), torch.arange(1, 22)
    assert (group_advantages(rewards, groups, lengths, estimator) == 0).all()


def test_rewards_to_come():
    gamma, rewards, baselines = 0.9, random(1, sum(LENGTHS)), random(2, len(LENGTHS))
    parts = rewards.split(LENGTHS)
    to_come = [sum(gamma**k * part[t + k] for k in range(len(part) - t)) for part in parts for t in range(len(part))]
    expected = torch.stack(to_come)
    assert_same_in_fp64(reinforce_plus_plus(rewards, BOUNDS, gamma), expected)
    less = torch.cat([baselines[i].expand(n) for i, n in enumerate(LENGTHS)])
    assert_same_in_fp64(remax(rewards, baselines, BOUNDS, gamma), expected - less)


def plain_gae(rewards, values, final_value, gamma, lam) -> list[float]:
    """The sum over all later TD errors, without the recursion."""
    following = [*values[1:], final_value]
    errors = [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lam) ** k * e for k, e in enumerate(errors[t:])) for t in range(len(errors))]


@pytest.mark.parametrize("bootstrap", [False, True])
@pytest.mark.parametrize(("alpha", "of_critic"), [(None, None), (None, 1.0), (0.4, None), (0.4, 1.0)])
def test_actor_and_critic_have_their_own_lambda(alpha, of_critic, bootstrap):
    config = AdvantageConfig(gamma=0.97, gae_lambda=0.9, critic_gae_lambda=of_critic, length_adaptive_alpha=alpha)
    rewards, values, final = (
        random(seed, size) for seed, size in enumerate((sum(LENGTHS), sum(LENGTHS), len(LENGTHS)))
    )
    advantages, returns = generalised(rewards, values, final if bootstrap else None, BOUNDS, config)
    expected_advantages, expected_returns = [], []
    for i, (r, v) in enumerate(zip(rewards.split(LENGTHS), values.split(LENGTHS), strict=True)):
        lam = 0.9 if alpha is None else torch.tensor(max(0.0, 1 - 1 / (alpha * LENGTHS[i]))).item()
        arguments = r.tolist(), v.tolist(), final[i].item() if bootstrap else 0.0, 0.97
        expected_advantages += plain_gae(*arguments, lam)
        of_returns = plain_gae(*arguments, 0.9 if of_critic is None else of_critic)
        expected_returns += [a + value for a, value in zip(of_returns, v.tolist(), strict=True)]
    assert_same_in_fp64(advantages, torch.tensor(expected_advantages, dtype=torch.float64))
    assert_same_in_fp64(returns, torch.tensor(expected_returns, dtype=torch.float64))


@pytest.mark.parametrize("bootstrap", [False, True])
def test_v_trace(bootstrap):
    """Against the sum with the products of c written out (eq. 1)."""
    gamma, lam, rho_bar, c_bar = 0.97, 0.9, 1.3, 1.1
    config = AdvantageConfig(
        estimator="vtrace", gamma=gamma, gae_lambda=lam, vtrace_rho_bar=rho_bar, vtrace_c_bar=c_bar
    )
    count = sum(LENGTHS)
    rewards, values, logs = (random(seed, count) for seed in range(3))
    final = random(3, len(LENGTHS))
    advantages, returns = v_trace(rewards, values, final if bootstrap else None, logs, BOUNDS, config)
    expected_advantages, expected_returns = [], []
    parts = (x.split(LENGTHS) for x in (rewards, values, logs.exp()))
    for i, (r, v, w) in enumerate(zip(*map(list, parts), strict=True)):
        rho, c = w.clamp(max=rho_bar), lam * w.clamp(max=c_bar)
        states = [*v.tolist(), final[i].item() if bootstrap else 0.0]
        errors = [rho[t] * (r[t] + gamma * states[t + 1] - states[t]) for t in range(len(r))]
        traces = [
            states[t] + sum(gamma ** (k - t) * c[t:k].prod() * errors[k] for k in range(t, len(r)))
            for t in range(len(r))
        ]
        later = [*traces[1:], states[-1]]
        expected_returns += traces
        expected_advantages += [rho[t] * (r[t] + gamma * later[t] - states[t]) for t in range(len(r))]
    assert_same_in_fp64(returns, torch.stack(expected_returns))
    assert_same_in_fp64(advantages, torch.stack(expected_advantages))


def test_v_trace_of_the_policys_own_samples_is_generalised_estimation():
    config = AdvantageConfig(estimator="vtrace", gamma=0.97, gae_lambda=0.9)
    rewards, values = (random(seed, sum(LENGTHS)) for seed in range(2))
    on_policy = torch.zeros_like(rewards)
    _, returns = v_trace(rewards, values, None, on_policy, BOUNDS, config)
    assert_same_in_fp64(returns, generalised(rewards, values, None, BOUNDS, config)[1])
    config.gae_lambda = 1.0
    advantages, _ = v_trace(rewards, values, None, on_policy, BOUNDS, config)
    assert_same_in_fp64(advantages, generalised(rewards, values, None, BOUNDS, config)[0])


def test_lambda_of_short_completions_is_zero():
    """VAPO's 1 - 1 / (0.05 length) is negative below 20 tokens, 0 at 20."""
    found = length_adaptive_lambda(torch.tensor([0, 1, 19, 20, 21, 40, 400]), 0.05)
    assert torch.equal(found[:4], torch.zeros(4))
    assert_rounds_to(found[4:], torch.tensor([1 - 20 / 21, 0.5, 0.95], dtype=torch.float64))
