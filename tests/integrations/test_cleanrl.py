"""The blocks of CleanRL's `ppo.py` against ours: its formulas written out here, in the inputs' type and in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo.integrations.cleanrl import PPOLoss, compute_gae, ppo_loss
from tests.tolerance import assert_as_exact_as_native

COEFFICIENTS = {"clip_coef": 0.2, "clip_vloss": True, "norm_adv": True, "ent_coef": 0.01, "vf_coef": 0.5}


def rollout(steps: int, envs: int, seed: int = 0) -> dict[str, Tensor]:
    """What the script holds after its environments' steps."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, steps, envs, generator=generator)
    dones, next_done = (torch.rand(n, envs, generator=generator).lt(0.2).float() for n in (steps, 1))
    next_value = torch.randn(1, envs, generator=generator)
    return {
        "rewards": rewards,
        "dones": dones,
        "values": values,
        "next_value": next_value,
        "next_done": next_done[0],
    }


def recursion(
    rewards: Tensor, dones: Tensor, values: Tensor, next_value: Tensor, next_done: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """dones[t + 1], and at last next_done, say whether step t was the last of its episode."""
    going = 1 - torch.cat([dones[1:], next_done.reshape(1, -1)])
    following = torch.cat([values[1:], next_value.reshape(1, -1)])
    deltas = rewards + gamma * following * going - values
    advantages, later = torch.zeros_like(rewards), 0.0
    for t in reversed(range(len(rewards))):
        later = advantages[t] = deltas[t] + gamma * lam * going[t] * later
    return advantages, advantages + values


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(
    steps=st.integers(1, 40),
    envs=st.integers(1, 20),
    gamma=st.sampled_from([0.0, 0.9, 0.99, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    seed=st.integers(0, 1000),
)
def test_advantages_are_the_bits_of_the_loop(steps, envs, gamma, lam, seed):
    case = rollout(steps, envs, seed)
    found = compute_gae(**case, gamma=gamma, gae_lambda=lam)
    native = recursion(**case, gamma=gamma, lam=lam)
    exact = recursion(**{name: x.double() for name, x in case.items()}, gamma=gamma, lam=lam)
    for a, b, c in zip(found, native, exact, strict=True):
        assert a.shape == (steps, envs) and a.is_contiguous() and torch.equal(a, b)
        assert_as_exact_as_native(a, b, c)


def test_flags_of_any_type_and_values_of_any_shape():
    case = rollout(12, 3)
    expected = compute_gae(**case, gamma=0.99, gae_lambda=0.95)
    for kind in (torch.bool, torch.uint8, torch.int64, torch.float64):
        flags = {name: case[name].to(kind) for name in ("dones", "next_done")}
        shapes = {"next_value": case["next_value"].reshape(3, 1), "rewards": case["rewards"].T.contiguous().T}
        found = compute_gae(**case | flags | shapes, gamma=0.99, gae_lambda=0.95)
        assert torch.equal(found.advantages, expected.advantages) and torch.equal(found.returns, expected.returns)


def test_nan_behind_the_end_of_an_episode_stays_there():
    """The script multiplies it by 0, which is NaN again."""
    case = rollout(8, 1)
    case["dones"][:] = 0
    case["dones"][4] = 1
    case["values"][4] = torch.nan
    found = compute_gae(**case, gamma=0.9, gae_lambda=0.8).advantages
    assert recursion(**case, gamma=0.9, lam=0.8)[0][:5].isnan().all()
    assert found[:4].isfinite().all() and found[4].isnan() and found[5:].isfinite().all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rewards": torch.zeros(8)}, r"rewards has shape \[8\], expected \[T, N\]"),
        ({"dones": torch.zeros(7, 2)}, r"dones has shape \[7, 2\], expected \[8, 2\] \(rewards' shape\)"),
        ({"next_value": torch.zeros(3)}, r"next_value has shape \[3\], expected 2 elements, one an environment"),
        ({"next_done": None}, "next_done is NoneType, expected a torch.Tensor"),
        ({"gamma": 1.5}, "gamma is 1.5"),
    ],
)
def test_wrong_rollouts_are_refused(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        compute_gae(**rollout(8, 2) | {"gamma": 0.99, "gae_lambda": 0.95} | change)


def minibatch(size: int, seed: int = 0) -> dict[str, Tensor]:
    """What the agent returns for a minibatch, which needs gradients, and what was stored of it."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(6, size, generator=generator)
    old = -numbers[0].abs()
    new = {"newlogprob": old + 0.2 * numbers[1], "entropy": numbers[2].abs(), "newvalue": numbers[3].reshape(-1, 1)}
    stored = {"mb_logprobs": old, "mb_advantages": 3 * numbers[4] + 1, "mb_returns": numbers[5]}
    stored["mb_values"] = numbers[3] + 0.3 * numbers[1]
    return {name: x.requires_grad_() for name, x in new.items()} | stored


def block(
    newlogprob: Tensor, entropy: Tensor, newvalue: Tensor, mb_logprobs: Tensor, mb_advantages: Tensor,
    mb_returns: Tensor, mb_values: Tensor, *, clip_coef: float, clip_vloss: bool, norm_adv: bool, ent_coef: float,
    vf_coef: float,
) -> PPOLoss:  # fmt: skip
    """The script's loss and statistics."""
    if norm_adv:
        mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
    log_ratio, value = newlogprob - mb_logprobs, newvalue.reshape(-1)
    ratio = log_ratio.exp()
    gains = mb_advantages * ratio, mb_advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef)
    pg_loss = -torch.minimum(*gains).mean()
    errors = (value - mb_returns).square()
    if clip_vloss:
        near = mb_values + (value - mb_values).clamp(-clip_coef, clip_coef)
        errors = torch.maximum(errors, (near - mb_returns).square())
    v_loss, entropy_loss = 0.5 * errors.mean(), entropy.mean()
    loss = pg_loss - ent_coef * entropy_loss + vf_coef * v_loss
    outside = ((ratio - 1).abs() > clip_coef).to(ratio.dtype).mean()
    return PPOLoss(loss, pg_loss, v_loss, entropy_loss, -log_ratio.mean(), (ratio - 1 - log_ratio).mean(), outside)


def with_gradients(function, case: dict[str, Tensor], options: dict) -> tuple[PPOLoss, list[Tensor]]:
    result = function(**case, **options)
    inputs = [case[name] for name in ("newlogprob", "entropy", "newvalue")]
    return result, torch.autograd.grad(3.0 * result.loss, inputs)


def in_fp64(case: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in case.items()}


def compare_scalars(*results: PPOLoss) -> None:
    """Sums of terms of both signs may cancel to any small number: they are judged together, on their mean's scale."""
    cancelling = ("loss", "pg_loss", "old_approx_kl")
    together = [torch.stack([getattr(result, name).detach() for name in cancelling]) for result in results]
    assert_as_exact_as_native(*together, ", ".join(cancelling))
    for name in PPOLoss._fields:
        if name not in cancelling:
            assert_as_exact_as_native(*(getattr(result, name).detach() for result in results), name)


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(
    size=st.integers(2, 300),
    clip_coef=st.sampled_from([0.1, 0.2, 0.5]),
    clip_vloss=st.booleans(),
    norm_adv=st.booleans(),
    ent_coef=st.sampled_from([0.01, 1.0]),
    vf_coef=st.sampled_from([0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_loss_statistics_and_gradients_as_exact_as_the_script(size, seed, **options):
    case = minibatch(size, seed)
    (found, gradients), (native, native_gradients), (exact, exact_gradients) = (
        with_gradients(*arguments, options) for arguments in ((ppo_loss, case), (block, case), (block, in_fp64(case)))
    )
    assert [name for name, x in found._asdict().items() if x.requires_grad] == ["loss"]
    compare_scalars(found, native, exact)
    for name, a, b, c in zip(
        ("newlogprob", "entropy", "newvalue"), gradients, native_gradients, exact_gradients, strict=True
    ):
        assert a.shape == case[name].shape
        assert_as_exact_as_native(a, b, c, f"gradient of {name}")


def test_no_entropy_bonus():
    """ent_coef = 0, as in ppo_continuous_action.py: the entropy is measured still."""
    case = minibatch(64)
    options = COEFFICIENTS | {"ent_coef": 0.0}
    found = ppo_loss(**case, **options)
    compare_scalars(found, block(**case, **options), block(**in_fp64(case), **options))
    found.loss.backward()
    assert case["entropy"].grad is None and case["newlogprob"].grad.any()


def test_the_first_epoch_has_no_divergence():
    """The policy that acted: ratios of exactly 1, nothing clipped, an approx_kl of exactly 0."""
    case = minibatch(64)
    case["newlogprob"] = case["mb_logprobs"].clone().requires_grad_()
    found = ppo_loss(**case, **COEFFICIENTS)
    assert found.approx_kl == found.old_approx_kl == found.clipfrac == 0


def test_far_ratios_are_held():
    """e^20 at most; the script has e^80, whose square overflows fp32 in the norm of its gradients."""
    case = minibatch(4)
    case["newlogprob"] = (case["mb_logprobs"] + 80).requires_grad_()
    found, gradients = with_gradients(ppo_loss, case, COEFFICIENTS)
    native, native_gradients = with_gradients(block, case, COEFFICIENTS)
    assert gradients[0].norm().isfinite() and not native_gradients[0].square().sum().isfinite()
    assert found.pg_loss < native.pg_loss


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mb_returns": torch.zeros(3)}, r"returns has shape \[3\], expected \[8\]"),
        ({"mb_advantages": torch.zeros(8, dtype=torch.int64)}, "mb_advantages has dtype torch.int64"),
        ({"newvalue": None}, "newvalue is NoneType"),
        ({"ent_coef": -1.0}, "entropy_coef is -1.0"),
    ],
)
def test_wrong_minibatches_are_refused(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ppo_loss(**minibatch(8) | COEFFICIENTS | change)
