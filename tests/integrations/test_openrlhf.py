"""Ours against OpenRLHF's own functions on the same inputs: values, types and gradients, what is refused, and the patched package.

OpenRLHF's modules are imported for real; stand-ins take the places of the packages that they import and these tests do not need.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo.bench.stand_ins import ASIDE, forget, standing_in
from fastppo.integrations import openrlhf as ours
from fastppo.reference.approx_kl import MAX_LOG_RATIO
from tests.cases import seeded
from tests.tolerance import assert_as_exact_as_native, assert_same_in_fp64

pytest.importorskip("openrlhf", reason="OpenRLHF is not installed (make peers)")

repeatable = settings(derandomize=True, deadline=None, max_examples=30)
SHAPES = [(1, 1), (2, 5), (3, 17), (5, 33)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MASK_DTYPES = [torch.bool, torch.int64, torch.float32]


@pytest.fixture(scope="module")
def theirs():
    """OpenRLHF's modules. What it compiles with torch.compile, a minute's work, runs as it is written."""
    with standing_in(ASIDE["openrlhf"]):
        from openrlhf.models import actor, loss, utils
        from openrlhf.trainer.ppo_utils import experience_maker
    with torch.compiler.set_stance("force_eager"):
        yield SimpleNamespace(actor=actor, loss=loss, utils=utils, maker=experience_maker)
    ours.unpatch()
    forget(("openrlhf",))


def compare(our, their, inputs: dict, exact=None, wanted=(), upstream=True) -> None:
    """`our(**inputs)` is of their types, and as close as theirs to `exact`, their formula in fp64: results, and the gradients of `wanted`.

    upstream: with a random gradient for each element of the first result, or with ones.
    """
    numbers = [
        name for name, x in inputs.items() if name != "action_mask" and isinstance(x, Tensor) and x.is_floating_point()
    ]
    wide = inputs | {name: inputs[name].double() for name in numbers}
    ours, native, exact = (
        run(function, arguments, wanted, upstream)
        for function, arguments in ((our, inputs), (their, inputs), (exact or their, wide))
    )
    assert len(ours) == len(native) == len(exact)
    for place, (a, b, c) in enumerate(zip(ours, native, exact, strict=True)):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype, f"result {place}: {a.dtype}, theirs {b.dtype}"
            if a.dtype == torch.float64:
                assert_same_in_fp64(a, c, f"result {place} of {wanted}")
            else:
                assert_as_exact_as_native(a, b, c.double(), f"result {place} of {wanted}")


def run(function, inputs: dict, wanted, upstream: bool) -> list[Tensor | None]:
    inputs = {name: x.clone() if isinstance(x, Tensor) and x.is_contiguous() else x for name, x in inputs.items()}
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in wanted}
    results = function(**inputs | {name: leaf * 1 for name, leaf in leaves.items()})
    results = list(results) if isinstance(results, tuple) else [results]
    if wanted:
        first = results[0]
        weights = torch.randn(first.shape, generator=seeded(7)).to(first.dtype)
        first.backward(weights if upstream else torch.ones_like(first))
    return [x if x is None else x.detach() for x in results] + [leaf.grad for leaf in leaves.values()]


def masks(kind: str, shape: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    batch, length = shape
    mask = torch.rand(shape, generator=seeded(seed)) < 0.6
    if kind == "ragged":
        lengths = torch.randint(1, length + 1, (batch, 1), generator=seeded(seed))
        mask = torch.arange(length) < lengths
    if kind == "one sequence empty":
        mask[0] = False
    mask[-1, 0] = True
    return mask.to(dtype)


def normal(shape, dtype, seed: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=seeded(seed)) * scale).to(dtype)


tokens = {
    "shape": st.sampled_from(SHAPES),
    "dtype": st.sampled_from(DTYPES),
    "kind": st.sampled_from(["ragged", "holes", "one sequence empty"]),
    "mask_dtype": st.sampled_from(MASK_DTYPES),
    "seed": st.integers(0, 10**6),
}


# Functions of logits


def layouts(logits: Tensor, layout: str) -> Tensor:
    """Equal logits where they may lie: the actor slices them, and transposes none."""
    if layout == "sliced":
        return torch.cat([logits, logits], 1)[:, : logits.shape[1]]
    return logits.transpose(0, 1).contiguous().transpose(0, 1) if layout == "transposed" else logits


@repeatable
@given(
    shape=st.sampled_from([(1, 1, 1), (2, 5, 17), (3, 4, 1025)]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "sliced", "transposed"]),
    temperature=st.sampled_from([1.0, 0.7, 1]),
    upstream=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_log_probs_from_logits(theirs, shape, dtype, layout, temperature, upstream, seed):
    logits = layouts(normal(shape, dtype, seed, 3.0), layout)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=seeded(seed))
    inputs = {"logits": logits, "labels": labels, "temperature": temperature}
    compare(ours.log_probs_from_logits, theirs.utils.log_probs_from_logits, inputs, None, ["logits"], upstream)


def test_logits_are_left_alone_but_for_strict(theirs):
    """Theirs divides its argument by the temperature: a caller that reads the logits again reads others."""
    labels = torch.tensor([1, 2])
    logits, theirs_logits, strict_logits = (torch.linspace(-2, 2, 10).view(2, 5) for _ in range(3))
    before = logits.clone()
    expected = theirs.utils.log_probs_from_logits(theirs_logits, labels, 0.5)
    ours.log_probs_from_logits(logits, labels, 0.5)
    assert torch.equal(logits, before)
    found = ours.log_probs_from_logits(strict_logits, labels, 0.5, strict=True)
    assert torch.equal(strict_logits, theirs_logits)
    assert_as_exact_as_native(
        found, expected, torch.log_softmax(before.double() / 0.5, -1).gather(-1, labels[:, None])[:, 0]
    )
    with pytest.raises(ValueError, match="labels"):
        ours.log_probs_from_logits(logits, torch.tensor([1, 5]), 0.5, strict=True)
    assert torch.equal(logits, before), "written before it was refused"


@repeatable
@given(
    shape=st.sampled_from([(1, 1, 1), (2, 5, 17), (3, 4, 1025)]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "sliced", "transposed"]),
    upstream=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_compute_entropy(theirs, shape, dtype, layout, upstream, seed):
    inputs = {"logits": layouts(normal(shape, dtype, seed, 3.0), layout)}
    compare(ours.compute_entropy, theirs.utils.compute_entropy, inputs, None, ["logits"], upstream)


def test_a_forbidden_token_has_no_entropy_but_for_strict(theirs):
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [1.0, 2.0, 3.0]], requires_grad=True)
    assert theirs.utils.compute_entropy(logits).isnan().tolist() == [True, False]
    entropy = ours.compute_entropy(logits)
    assert_as_exact_as_native(
        entropy[:1].detach(),
        entropy[:1].detach(),
        torch.distributions.Bernoulli(logits=torch.ones(1).double()).entropy(),
    )
    strict = ours.compute_entropy(logits, strict=True)
    assert strict.isnan().tolist() == [True, False]
    strict.sum().backward()
    assert logits.grad.isnan().any(-1).tolist() == [True, False]


# The KL


@repeatable
@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES[:3]),
    seed=st.integers(0, 10**6),
    kl_estimator=st.sampled_from(["k1", "k2", "k3"]),
    scale=st.sampled_from([0.1, 2.0, 15.0]),
    mode=st.sampled_from(["plain", "unbiased", "unbiased with old"]),
    upstream=st.booleans(),
)
def test_compute_approx_kl(theirs, shape, dtype, seed, kl_estimator, scale, mode, upstream):
    """Every estimator on both sides of its clamps, in value and gradient."""
    inputs = {name: normal(shape, dtype, seed + i, scale) for i, name in enumerate(["log_probs", "log_probs_base"])}
    inputs |= {"kl_estimator": kl_estimator, "unbiased_gradient": mode != "plain"}
    if mode.endswith("old"):
        inputs["log_probs_old"] = normal(shape, dtype, seed + 2, scale)

    def exact(**inputs):
        with mock.patch.object(Tensor, "float", Tensor.double):
            return theirs.utils.compute_approx_kl(**inputs)

    wanted = ["log_probs"] if mode != "plain" else ["log_probs", "log_probs_base"]
    compare(ours.compute_approx_kl, theirs.utils.compute_approx_kl, inputs, exact, wanted, upstream)


def test_the_kl_of_fp64_is_fp32_as_theirs(theirs):
    inputs = normal((2, 5), torch.float64, 0, 3.0), normal((2, 5), torch.float64, 1, 3.0)
    kl = ours.compute_approx_kl(*inputs, kl_estimator="k2")
    assert torch.equal(kl, theirs.utils.compute_approx_kl(*inputs, kl_estimator="k2"))
    assert kl.dtype == torch.float32


def test_an_unbiased_gradient_costs_the_value_no_digits_but_for_strict(theirs):
    inputs = {"log_probs": torch.tensor([-3000.0, -torch.inf]), "log_probs_base": torch.tensor([-0.5, -0.5])}
    inputs |= {"kl_estimator": "k3", "unbiased_gradient": True}
    expected = theirs.utils.compute_approx_kl(**inputs)
    assert ours.compute_approx_kl(**inputs).tolist() == [10.0, 10.0]
    assert expected[1].isnan() and expected[0] == 10.0
    assert ours.compute_approx_kl(**inputs, strict=True)[1].isnan()


# The losses


def totals(kind: str) -> dict:
    """What the trainer knows of the whole batch: nothing, numbers, or, as `get_loss_batch_info` makes them, tensors."""
    if kind == "none":
        return {}
    made = {"dp_size": 2, "batch_num_tokens": 40.5, "global_batch_size": 6.0}
    return {name: torch.tensor(x) if kind == "tensors" and name != "dp_size" else x for name, x in made.items()}


CORRECTIONS = {
    "off": {},
    "icepop": {"is_correction_level": "token"},
    "icepop between other bounds": {"is_correction_level": "token", "is_correction_threshold": [0.0, 1.5]},
    "tis": {"is_correction_level": "token", "is_correction_mode": "clip"},
    "seq-mask-tis": {"is_correction_level": "seq", "is_correction_threshold": (0.8, 1.3)},
}


@settings(repeatable, max_examples=120)
@given(
    **tokens,
    kind_of_totals=st.sampled_from(["none", "numbers", "tensors"]),
    correction=st.sampled_from(list(CORRECTIONS)),
    loss_type=st.sampled_from(["ppo", "ppo", "gspo"]),
    token_level=st.booleans(),
    dual_clip=st.sampled_from([None, 1.5]),
    scale=st.sampled_from([0.3, 12.0]),
)
def test_policy_loss(
    theirs, shape, dtype, kind, mask_dtype, seed, kind_of_totals, correction, loss_type, token_level, dual_clip, scale
):
    """All that `ppo_loss` covers: the five results and the gradient, with log-ratios within and beyond the clamp."""
    if dtype == torch.float16:
        scale = 0.3  # ratios that fp16 holds
    elif loss_type == "gspo":
        scale = min(scale, 5.0)  # theirs clamps nothing there
    inputs = {name: normal(shape, dtype, seed + i, scale) for i, name in enumerate(["log_probs", "old_log_probs"])}
    inputs["rollout_log_probs"] = inputs["old_log_probs"] + normal(shape, dtype, seed + 2, 0.5)
    inputs |= {"advantages": normal(shape, dtype, seed + 3), "action_mask": masks(kind, shape, mask_dtype, seed)}
    options = {"clip_eps_high": 0.3, "dual_clip": dual_clip, "token_level_loss": token_level}
    options |= {"policy_loss_type": loss_type} | CORRECTIONS[correction]
    if dtype in (torch.bfloat16, torch.float16):
        inputs["advantages"] = inputs["advantages"].sign()  # what theirs rounds to a half is its own affair
    compare(
        ours.PolicyLoss(**options),
        theirs.loss.PolicyLoss(**options),
        inputs | totals(kind_of_totals),
        wanted=["log_probs"],
    )


@settings(repeatable, max_examples=40)
@given(
    **tokens,
    kind_of_totals=st.sampled_from(["none", "numbers", "tensors"]),
    clip_eps=st.sampled_from([None, 0.2]),
    token_level=st.booleans(),
)
def test_value_loss(theirs, shape, dtype, kind, mask_dtype, seed, kind_of_totals, clip_eps, token_level):
    inputs = {name: normal(shape, dtype, seed + i) for i, name in enumerate(["values", "old_values", "returns"])}
    inputs |= {"action_mask": masks(kind, shape, mask_dtype, seed)} | totals(kind_of_totals)
    options = {"clip_eps": clip_eps, "token_level_loss": token_level}
    compare(ours.ValueLoss(**options), theirs.loss.ValueLoss(**options), inputs, wanted=["values"])


def test_losses_without_a_mask(theirs):
    inputs = {
        name: normal((3, 5), torch.float32, i) for i, name in enumerate(["log_probs", "old_log_probs", "advantages"])
    }
    compare(ours.PolicyLoss(), theirs.loss.PolicyLoss(), inputs, wanted=["log_probs"])
    inputs = {name: normal((3, 5), torch.float32, i) for i, name in enumerate(["values", "old_values", "returns"])}
    compare(ours.ValueLoss(), theirs.loss.ValueLoss(), inputs, wanted=["values"])


@pytest.mark.parametrize("options", [{}, {"token_level_loss": False}, {"policy_loss_type": "gspo"}, CORRECTIONS["tis"]])
@pytest.mark.parametrize("fault", ["NaN under the mask", "nothing unmasked"])
def test_what_masks_hide_stays_hidden_but_for_strict(theirs, options, fault):
    """Theirs multiplies by the mask and divides by its sum: NaN where nothing should be."""
    inputs = {
        name: normal((2, 4), torch.float32, i) for i, name in enumerate(["log_probs", "old_log_probs", "advantages"])
    }
    inputs["rollout_log_probs"] = inputs["old_log_probs"].clone()
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    if fault == "nothing unmasked":
        mask = torch.zeros_like(mask)
    else:
        inputs["advantages"][0, 3] = inputs["old_log_probs"][0, 2] = torch.nan
    expected = theirs.loss.PolicyLoss(**options)(**inputs, action_mask=mask)
    found = ours.PolicyLoss(**options)(**inputs, action_mask=mask)
    strict = ours.PolicyLoss(**options)(**inputs, action_mask=mask, strict=True)
    assert expected[0].isnan() and expected[2].isnan()
    assert all(x is None or x.isfinite() for x in found)
    assert [x is not None and bool(x.isnan()) for x in strict] == [x is not None and bool(x.isnan()) for x in expected]


@pytest.mark.parametrize("clip_eps", [None, 0.2])
@pytest.mark.parametrize("fault", ["NaN under the mask", "nothing unmasked"])
def test_what_masks_hide_from_values_stays_hidden_but_for_strict(theirs, clip_eps, fault):
    inputs = {name: normal((2, 4), torch.float32, i) for i, name in enumerate(["values", "old_values", "returns"])}
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    if fault == "nothing unmasked":
        mask = torch.zeros_like(mask)
    else:
        inputs["returns"][0, 3] = torch.nan
    assert theirs.loss.ValueLoss(clip_eps)(**inputs, action_mask=mask).isnan()
    assert ours.ValueLoss(clip_eps)(**inputs, action_mask=mask).isfinite()
    assert ours.ValueLoss(clip_eps)(**inputs, action_mask=mask, strict=True).isnan()


# Advantages and returns


@repeatable
@given(**tokens, gamma=st.sampled_from([1.0, 0.9, 1]), lambd=st.sampled_from([1.0, 0.95, 0.0]))
def test_advantages_and_returns(theirs, shape, dtype, kind, mask_dtype, seed, gamma, lambd):
    """A masked step decays what passes it: no mask of `gae` does that, zeros in its place do."""
    maker = theirs.maker.RemoteExperienceMaker
    inputs = {"values": normal(shape, dtype, seed), "rewards": normal(shape, torch.float32, seed + 1)}
    inputs |= {"action_mask": masks(kind, shape, mask_dtype, seed), "gamma": gamma, "self": None}
    compare(ours.get_advantages_and_returns, maker.get_advantages_and_returns, inputs | {"lambd": lambd})
    inputs["rewards"] = inputs["rewards"].to(dtype)
    compare(
        ours.get_cumulative_returns, maker.get_cumulative_returns, {k: v for k, v in inputs.items() if k != "values"}
    )


def test_advantages_without_a_mask_and_from_a_graph(theirs):
    """As in their experience maker nothing is differentiated, whatever comes in."""
    values = normal((2, 7), torch.float32, 0).requires_grad_()
    inputs = {"self": None, "values": values, "rewards": normal((2, 7), torch.float32, 1), "action_mask": None}
    compare(
        ours.get_advantages_and_returns,
        theirs.maker.RemoteExperienceMaker.get_advantages_and_returns,
        inputs | {"gamma": 0.9, "lambd": 0.5},
    )
    assert not ours.get_advantages_and_returns(**inputs, gamma=0.9, lambd=0.5)[1].requires_grad


def test_masked_steps_reach_nothing_but_for_strict(theirs):
    values, rewards, mask = torch.ones(1, 3), torch.tensor([[1.0, torch.nan, 1.0]]), torch.tensor([[1, 0, 1]])
    arguments = (None, values, rewards, mask, 0.9, 0.9)
    expected = theirs.maker.RemoteExperienceMaker.get_advantages_and_returns(*arguments)
    assert all(x.isfinite().all() for x in ours.get_advantages_and_returns(*arguments))
    strict = ours.get_advantages_and_returns(*arguments, strict=True)
    assert [x.isnan().tolist() for x in strict] == [x.isnan().tolist() for x in expected]
    assert ours.get_cumulative_returns(None, rewards, mask, 0.9, strict=True).isnan().tolist() == [[True, True, False]]


# What is refused


LOSS_INPUTS = {name: torch.zeros(2, 3) for name in ("log_probs", "old_log_probs", "advantages", "rollout_log_probs")}
LOSS_INPUTS["action_mask"] = torch.ones(2, 3)


@pytest.mark.parametrize(
    "options, changed, message",
    [
        ({}, {"advantages": torch.zeros(2, 1)}, "advantages has shape"),
        ({}, {"log_probs": [torch.zeros(3)]}, "log_probs is list"),
        ({}, {"advantages": torch.zeros(2, 3, dtype=torch.int64)}, "advantages has dtype torch.int64"),
        ({}, {"action_mask": torch.full((2, 3), 0.5)}, "action_mask holds other numbers than 0 and 1"),
        ({}, {"old_log_probs": torch.zeros(2, 3, requires_grad=True)}, "old_log_probs requires a gradient"),
        ({}, {"action_mask": None, "batch_num_tokens": 3.0}, "action_mask is None"),
        ({}, {"batch_num_tokens": 3.0, "dp_size": 0}, "dp_size is 0"),
        ({"token_level_loss": False}, {"action_mask": None}, "action_mask is None"),
        ({"clip_eps_low": -0.1}, {}, "clip_low is -0.1"),
        ({"policy_loss_type": "other"}, {}, "policy_loss_type is 'other'"),
        ({"is_correction_level": "token"}, {"rollout_log_probs": None}, "rollout_log_probs is NoneType"),
        (
            {"is_correction_level": "seq", "is_correction_gating": "binary_kl", "is_correction_threshold": (0.0, 0.1)},
            {},
            "is_correction_gating is 'binary_kl'",
        ),
        (
            {"policy_loss_type": "gspo"},
            {"log_probs": torch.full((2, 3), 2 * MAX_LOG_RATIO), "strict": True},
            "log-ratio",
        ),
    ],
)
def test_refused_losses(options, changed, message):
    """TypeError or ValueError, which the patch answers with their own function."""
    with pytest.raises((TypeError, ValueError), match=message):
        ours.PolicyLoss(**options)(**LOSS_INPUTS | changed)


@pytest.mark.parametrize(
    "options",
    [
        {"dual_clip": 1.0},
        {"is_correction_level": "row"},
        {"is_correction_mode": "drop"},
        {"is_correction_gating": "kl"},
        {"is_correction_level": "seq", "is_correction_mode": "clip"},
        {"is_correction_level": "token", "is_correction_gating": "tv"},
    ],
)
def test_options_that_theirs_refuses_too(theirs, options):
    for loss in (ours.PolicyLoss, theirs.loss.PolicyLoss):
        with pytest.raises((ValueError, AssertionError)):
            loss(**options)


def test_other_refused_calls():
    two = torch.zeros(2, 3)
    for call in (
        lambda: ours.log_probs_from_logits(two.long(), torch.zeros(2, dtype=torch.int64)),
        lambda: ours.log_probs_from_logits(two, torch.zeros(3, dtype=torch.int64)),
        lambda: ours.log_probs_from_logits(two, torch.tensor([0, 3])),
        lambda: ours.log_probs_from_logits(two, torch.zeros(2, dtype=torch.int64), 0.0),
        lambda: ours.compute_entropy(two.int()),
        lambda: ours.compute_approx_kl(two, torch.zeros(3)),
        lambda: ours.compute_approx_kl(two, two, kl_estimator="k4"),
        lambda: ours.compute_approx_kl(two, two, torch.zeros(3), unbiased_gradient=True),
        lambda: ours.ValueLoss()(two, two, two.clone().requires_grad_()),
        lambda: ours.ValueLoss(-0.2)(two, two, two),
        lambda: ours.get_advantages_and_returns(None, two, two, None, 1.1, 0.9),
        lambda: ours.get_advantages_and_returns(None, two, two, torch.full((2, 3), 0.5), 0.9, 0.9),
        lambda: ours.get_cumulative_returns(None, two.long(), None, 0.9),
    ):
        with pytest.raises((TypeError, ValueError)):
            call()


# The patched package


def test_the_trainer_gets_ours_and_then_its_own_back(theirs):
    """Also names imported before, and losses made before."""
    names = ["log_probs_from_logits", "compute_entropy"]
    before = [getattr(theirs.actor, name) for name in names] + [theirs.maker.compute_approx_kl]
    methods = [vars(theirs.loss.PolicyLoss)["forward"], vars(theirs.loss.ValueLoss)["forward"]]
    advantages = vars(theirs.maker.RemoteExperienceMaker)["get_advantages_and_returns"]
    policy_loss = theirs.loss.PolicyLoss()
    nothing = torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, 2)
    assert policy_loss(*nothing)[0].isnan()
    with ours.patch() as patch:
        assert len(patch) == 7
        assert policy_loss(*nothing)[0] == 0
        assert theirs.actor.compute_entropy(torch.tensor([0.0, -torch.inf])) == 0
        for module, name in [(theirs.actor, names[0]), (theirs.actor, names[1]), (theirs.maker, "compute_approx_kl")]:
            assert (
                getattr(module, name)
                is getattr(theirs.utils, name)
                is not before[names.index(name) if name in names else 2]
            )
    assert [getattr(theirs.actor, name) for name in names] + [theirs.maker.compute_approx_kl] == before
    assert [vars(theirs.loss.PolicyLoss)["forward"], vars(theirs.loss.ValueLoss)["forward"]] == methods
    assert vars(theirs.maker.RemoteExperienceMaker)["get_advantages_and_returns"] is advantages
    assert policy_loss(*nothing)[0].isnan()


def test_strict_reaches_every_function(theirs):
    with ours.patch(strict=True):
        assert theirs.actor.compute_entropy(torch.tensor([0.0, -torch.inf])).isnan()
        assert theirs.loss.ValueLoss()(*[torch.zeros(1, 2)] * 4).isnan()


def test_what_ours_refuses_runs_as_theirs(theirs, caplog):
    """A divergence as the gate is theirs alone; it is said once."""
    options = {"is_correction_level": "seq", "is_correction_gating": "tv", "is_correction_threshold": (0.0, 0.1)}
    loss = theirs.loss.PolicyLoss(**options)
    expected = loss(**LOSS_INPUTS)
    with caplog.at_level(logging.WARNING), ours.patch():
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(loss(**LOSS_INPUTS), expected, strict=True))
    assert len(caplog.records) == 1 and "is_correction_gating is 'tv'" in caplog.text
