"""The terms of the loss that the op does not know, and what it is given for those that it does: numbers, denominators, splits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastppo.algorithms.advantages import sampling_logprobs
from fastppo.algorithms.ppo import PPO
from fastppo.rollout import FinishReason
from tests.tiny import ppo_config
from tests.tolerance import assert_as_exact_as_native, assert_rounds_to, assert_same_in_fp64
from tests.trainer.test_ppo import gradients, make_roles, make_rollout, make_step


def moved(roles):
    """The same roles away from ratio 1, so that clipping and weights matter."""
    with torch.no_grad():
        for parameter in roles.policy.parameters():
            parameter.mul_(1.15)
    return roles


def truncated_somewhere(rollout):
    """Every third sequence counts as cut off."""
    reasons = torch.full_like(rollout.finish_reasons, FinishReason.STOP)
    reasons[::3] = FinishReason.LENGTH
    return dataclasses.replace(rollout, finish_reasons=reasons)


@pytest.mark.parametrize(
    "aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "fixed-denominator"]
)
def test_truncated_completions_count_for_nothing(aggregation):
    """The gradients are those of the other completions alone, which have the advantages of the whole batch; whitened over those that count."""
    options = {"loss__aggregation": aggregation, "loss__positive_nll_coef": 0.3, "advantage__whiten": False}
    config = ppo_config(loss__mask_truncated_completions=True, **options)
    roles = make_roles("separate")
    step = make_step(roles, config, truncated_somewhere(make_rollout(roles)))
    everyone = list(range(step.rollout.num_sequences))
    others = [i for i in everyone if i % 3]
    moved(roles)
    metrics = step.accumulate(roles, [everyone[:5], everyone[5:]], config)
    found = gradients(roles)

    rollout, evaluation = step.rollout.select(others), step.evaluation.select(others)
    targets = dataclasses.replace(step.targets.select(others), kept=None)
    alone = step._replace(rollout=rollout, evaluation=evaluation, targets=targets)
    expected_metrics = alone.accumulate(roles, [list(range(len(others)))], ppo_config(**options))
    expected = gradients(roles)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_as_exact_as_native(found[name].float(), gradient.float(), gradient.double(), name)
    for name, value in expected_metrics.items():
        assert_rounds_to(torch.tensor(metrics[name]), value, name)
    whitened = PPO(dataclasses.replace(config, advantage={"whiten": True})).credit(
        step.rollout, step.evaluation, step.scores
    )
    kept = torch.cat([x for i, x in enumerate(whitened.advantages.split(step.rollout.action_counts)) if i % 3])
    assert_rounds_to(1 + kept.mean(), 1.0)


def test_a_minibatch_of_truncated_completions_alone_teaches_nothing():
    config = ppo_config(loss__mask_truncated_completions=True, loss__positive_nll_coef=0.3)
    roles = make_roles("separate")
    step = make_step(roles, config, truncated_somewhere(make_rollout(roles)))
    metrics = step.accumulate(roles, [[0, 3]], config)
    assert metrics["loss/policy_avg"] == metrics["loss/positive_nll_avg"] == metrics["policy/entropy_avg"] == 0
    assert all((gradient == 0).all() for gradient in gradients(roles).values())


@pytest.mark.parametrize("split", [[list(range(12))], [[i] for i in range(12)]])
def test_nll_of_good_completions(split):
    """The mean over the tokens of those whose score is above the threshold (scores go from -1 to 2), however they are split."""
    options = {"loss__positive_nll_threshold": 0.4}
    roles = make_roles("separate")
    config, plain = ppo_config(loss__positive_nll_coef=0.25, **options), ppo_config(**options)
    step = make_step(roles, config)
    good = [i for i, score in enumerate(step.scores.values.tolist()) if score > 0.4]
    assert 2 < len(good) < 12
    moved(roles)
    metrics = step.accumulate(roles, split, config)
    with_nll = gradients(roles)
    without_positive = step._replace(targets=dataclasses.replace(step.targets, positive=None))
    without_positive.accumulate(roles, split, plain)
    without = gradients(roles)

    nll = -roles(step.rollout.select(good), values=False).logprobs.mean()
    assert_rounds_to(torch.tensor(metrics["loss/positive_nll_avg"]), nll.item())
    (0.25 * nll).backward()
    for name, gradient in gradients(roles).items():
        assert_as_exact_as_native(with_nll[name].float(), (without[name] + gradient).float(), without[name] + gradient)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_importance_weights_of_sampling(level):
    lengths = [3, 1, 5]
    bounds = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    old, sampled = (-torch.rand(9, dtype=torch.float64, generator=generator) for _ in range(2))
    weights = (old - sampling_logprobs(old, sampled, bounds, level)).exp()
    expected = []
    for gap in (old - sampled).split(lengths):
        whole = {"token": gap, "sequence": gap.sum(), "geometric": gap.mean()}[level]
        expected.append(whole.exp().expand(len(gap)))
    assert_same_in_fp64(weights, torch.cat(expected))


@pytest.mark.parametrize("correction", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_the_policy_loss_is_weighed(correction, level):
    """With the old policy as it is, the loss is -w A: w of the distribution that was sampled from, not of the raw one."""
    bounds = (0.9, 1.1)
    correct = {"loss__rollout_correction": correction, "loss__rollout_correction_level": level}
    config = ppo_config(loss__rollout_bounds=bounds, critic__vf_coef=0.0, **correct)
    roles = make_roles("separate")
    rollout = make_rollout(roles)
    noise = 0.4 * torch.randn(rollout.num_actions, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rollout = dataclasses.replace(rollout, processed_logprobs=rollout.logprobs + noise, logprobs=rollout.logprobs + 9)
    step = make_step(roles, config, rollout)
    losses, weights = [], []
    gaps = (step.evaluation.logprobs.double() - rollout.processed_logprobs).split(rollout.action_counts)
    for gap, advantages in zip(gaps, step.targets.advantages.double().split(rollout.action_counts), strict=True):
        w = {"token": gap, "sequence": gap.sum(), "geometric": gap.mean()}[level].exp().expand(len(gap))
        applied = w.clamp(max=1.1) if correction == "truncate" else torch.where((w < 0.9) | (w > 1.1), 0, w)
        losses.append(-applied * advantages)
        weights.append((w, applied))
    metrics = step.accumulate(roles, [list(range(12))], config)
    loss, w, applied = torch.cat(losses), *(torch.cat(x) for x in zip(*weights, strict=True))
    size = loss.abs().mean()  # of a sum that cancels
    assert_rounds_to((size + metrics["loss/policy_avg"]).float(), size + loss.mean())
    assert_rounds_to(torch.tensor(metrics["rollout/weight_avg"]), w.mean())
    assert_rounds_to(torch.tensor(metrics["rollout/weight_clipfrac"]), (w != applied).double().mean())
    assert 0 < metrics["rollout/weight_clipfrac"] < 1
