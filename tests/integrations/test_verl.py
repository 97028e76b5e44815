"""verl's functions beside ours: values, gradients, dtypes, what is refused, and the patched package. Exact is verl's own formula in fp64."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo.integrations import verl as ours
from fastppo.reference.token_logprobs import token_logprobs as reference_logprobs
from tests.cases import DTYPES
from tests.tolerance import assert_as_exact_as_native, assert_no_worse_than

core = pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed")
functional = pytest.importorskip("verl.utils.torch_functional")
fused = pytest.importorskip("verl.utils.experimental.torch_functional")
losses = pytest.importorskip("verl.workers.utils.losses")
workers_config = pytest.importorskip("verl.workers.config")
omegaconf = pytest.importorskip("omegaconf")

MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
MASKS = [torch.bool, torch.int64, torch.float32]
POLICY_LOSSES = ["vanilla", "gspo", "cispo"]
NO_LIMIT = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.differing_executors],
)

# The global batch as a trainer passes it: nothing of it, its totals, and those with a horizon of its own.
totals = st.sampled_from(
    [
        {},
        {"dp_size": 4, "batch_num_tokens": 97, "global_batch_size": 12},
        {"dp_size": 1, "batch_num_tokens": 55, "global_batch_size": 3, "loss_scale_factor": 64},
        {"loss_scale_factor": 0.5},
    ]
)
shapes = st.tuples(st.integers(1, 5), st.integers(2, 40))
dtypes, mask_dtypes, modes, seeds = (
    st.sampled_from(DTYPES),
    st.sampled_from(MASKS),
    st.sampled_from(MODES),
    st.integers(0, 1000),
)


def tokens(shape: tuple[int, int], mask_dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Log-probabilities of two policies, advantages, weights of a rollout; a mask with holes, an empty row and two tokens at least."""
    torch.manual_seed(seed)
    old = -3 * torch.rand(shape)
    mask = torch.rand(shape) < 0.7
    mask[torch.randint(shape[0], ())] = False
    mask[0, :2] = True
    return {
        "old_log_prob": old,
        "log_prob": old + torch.randn(shape),
        "advantages": torch.randn(shape),
        "response_mask": mask.to(mask_dtype),
        "rollout_is_weights": 0.1 + 2 * torch.rand(shape),
    }


def outputs_of(
    function: Callable, arguments: dict, wanted: tuple[str, ...]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """What is returned, as tensors, and the gradients of the `wanted` arguments under one random upstream gradient."""
    arguments = {name: x.detach().requires_grad_() if name in wanted else x for name, x in arguments.items()}
    returned = function(**arguments)
    outputs = [x for x in (returned if isinstance(returned, tuple) else (returned,)) if isinstance(x, Tensor)]
    roots = [x for x in outputs if x.requires_grad]
    torch.manual_seed(7)
    upstream = [torch.randn(x.shape, dtype=torch.float64).bfloat16().to(x.dtype) for x in roots]
    if roots:
        torch.autograd.backward(roots, upstream)
    return [x.detach() for x in outputs], [arguments[name].grad for name in wanted]


def compare(
    theirs: Callable,
    function: Callable,
    arguments: dict,
    wanted: tuple[str, ...] = (),
    formula: Callable | None = None,
    rule: Callable = assert_as_exact_as_native,
) -> None:
    """Dtypes and shapes are theirs; values and gradients are as near as theirs to the exact `formula`: their own in fp64."""
    in_fp64 = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in arguments.items()
    }
    native, native_grads = outputs_of(theirs, arguments, wanted)
    exact, exact_grads = outputs_of(formula or theirs, in_fp64, wanted)
    got, grads = outputs_of(function, arguments, wanted)
    assert len(got) == len(native)
    for place, (a, b, c) in enumerate(zip(got, native, exact, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape, (
            f"output {place} is {a.dtype} {a.shape}, theirs {b.dtype} {b.shape}"
        )
        rule(a, b, c.double(), f"output {place}")
    for name, a, b, c in zip(wanted, grads, native_grads, exact_grads, strict=True):
        assert a.dtype == b.dtype
        rule(a, b, c, f"gradient of {name}")


def actor(**options) -> object:
    return workers_config.ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **options)


def cast(arguments: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x if name.endswith("mask") else x.to(dtype) for name, x in arguments.items()}


@pytest.mark.parametrize("kind", POLICY_LOSSES)
@given(shapes, dtypes, mask_dtypes, modes, totals, st.booleans(), seeds)
@NO_LIMIT
def test_policy_losses(kind, shape, dtype, mask_dtype, mode, info, weighed, seed):
    """Loss and gradient in every mode, with a part of a global batch, weights of a rollout, and its metrics as Python floats."""
    arguments = cast(tokens(shape, mask_dtype, seed), dtype)
    arguments["advantages"] = arguments[
        "advantages"
    ].float()  # a trainer's are fp32 beside half-precision log-probabilities
    if not weighed:
        del arguments["rollout_is_weights"]
    config = actor(clip_ratio_low=0.15, clip_ratio_high=0.3, clip_ratio_c=2.5, global_batch_info=dict(info))
    settings = {"loss_agg_mode": mode, "config": config}

    def with_metrics(function):
        def run(**inputs):
            loss, metrics = function(**inputs, **settings)
            assert list(metrics) == ["actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"]
            assert all(type(x) is float for x in metrics.values())
            return loss, *(torch.tensor(x) for x in metrics.values())

        return run

    name = f"compute_policy_loss_{kind}"
    compare(with_metrics(getattr(core, name)), with_metrics(getattr(ours, name)), arguments, ("log_prob",))


@given(
    shapes, dtypes, mask_dtypes, modes, st.sampled_from([(0.2, None, None), (0.2, 0.1, None), (None, 0.1, 0.3)]), seeds
)
@NO_LIMIT
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_deprecated_policy_loss(shape, dtype, mask_dtype, mode, clips, seed):
    """Four tensors, of which the KL has a gradient too."""
    arguments = cast(tokens(shape, mask_dtype, seed), dtype)
    del arguments["rollout_is_weights"]
    settings = dict(zip(("cliprange", "cliprange_low", "cliprange_high"), clips, strict=True))
    settings |= {"loss_agg_mode": mode, "clip_ratio_c": 2.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compare(
            lambda **inputs: core.compute_policy_loss(**inputs, **settings),
            lambda **inputs: ours.compute_policy_loss(**inputs, **settings),
            arguments,
            ("log_prob",),
        )


@given(shapes, dtypes, mask_dtypes, modes, totals, seeds)
@NO_LIMIT
def test_value_loss(shape, dtype, mask_dtype, mode, info, seed):
    made = tokens(shape, mask_dtype, seed)
    arguments = {
        "vpreds": made["log_prob"],
        "values": made["old_log_prob"],
        "returns": made["advantages"],
        "response_mask": made["response_mask"],
    }
    settings = {"cliprange_value": 0.3, "loss_agg_mode": mode, **info}
    compare(
        lambda **inputs: core.compute_value_loss(**inputs, **settings),
        lambda **inputs: ours.compute_value_loss(**inputs, **settings),
        cast(arguments, dtype),
        ("vpreds",),
    )


@given(shapes, dtypes, mask_dtypes, modes, totals, seeds)
@NO_LIMIT
def test_agg_loss(shape, dtype, mask_dtype, mode, info, seed):
    made = tokens(shape, mask_dtype, seed)
    compare(
        lambda **inputs: core.agg_loss(**inputs, loss_agg_mode=mode, **info),
        lambda **inputs: ours.agg_loss(**inputs, loss_agg_mode=mode, **info),
        cast({"loss_mat": made["log_prob"], "loss_mask": made["response_mask"]}, dtype),
        ("loss_mat",),
    )


@pytest.mark.parametrize("holes", [True, False])
@given(shapes, dtypes, st.sampled_from(MASKS[1:]), st.floats(0, 1), st.floats(0, 1), seeds)
@NO_LIMIT
def test_gae(holes, shape, dtype, mask_dtype, gamma, lam, seed):
    """Rewards are fp32 beside values of any type; masked steps hold what verl's recursion leaves there."""
    made = tokens(shape, mask_dtype, seed)
    mask = (
        made["response_mask"]
        if holes
        else torch.arange(shape[1]).expand(shape) < torch.randint(2, shape[1] + 1, (shape[0], 1))
    )
    arguments = {
        "token_level_rewards": made["advantages"],
        "values": made["old_log_prob"].to(dtype),
        "response_mask": mask.to(mask_dtype),
    }
    compare(
        lambda **inputs: core.compute_gae_advantage_return(**inputs, gamma=gamma, lam=lam),
        lambda **inputs: ours.compute_gae_advantage_return(**inputs, gamma=gamma, lam=lam),
        arguments,
    )


@given(shapes, dtypes, mask_dtypes, st.booleans(), seeds)
@NO_LIMIT
def test_masked_mean_and_whiten(shape, dtype, mask_dtype, shift_mean, seed):
    made = tokens(shape, mask_dtype, seed)
    arguments = {"values": made["advantages"].to(dtype), "mask": made["response_mask"]}
    compare(functional.masked_mean, ours.masked_mean, arguments, ("values",))
    compare(
        lambda **inputs: functional.masked_whiten(**inputs, shift_mean=shift_mean),
        lambda **inputs: ours.masked_whiten(**inputs, shift_mean=shift_mean),
        arguments,
    )


@pytest.mark.parametrize(
    "kind", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "kl+", "k1+", "mse+", "k2+", "low_var_kl+", "k3+"]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_penalty(kind, dtype):
    """Every kind, from log-ratios of nearly 0 to those beyond both clamps; gradients of both policies."""
    logprob = -3 * torch.rand(4, 60)
    ref_logprob = logprob + torch.randn(4, 60) * torch.logspace(-2, 1.3, 60)
    arguments = {"logprob": logprob.to(dtype), "ref_logprob": ref_logprob.to(dtype)}
    wanted = ("logprob", "ref_logprob")
    if dtype == torch.float16 and "k3" in kind:  # verl's exp overflows: a gradient of NaN
        arguments["ref_logprob"] = arguments["logprob"] + (arguments["ref_logprob"] - arguments["logprob"]).clamp(
            -10, 10
        )
    compare(
        lambda **inputs: core.kl_penalty(**inputs, kl_penalty=kind),
        lambda **inputs: ours.kl_penalty(**inputs, kl_penalty=kind),
        arguments,
        wanted,
    )
    if not kind.endswith("+"):
        compare(
            lambda **inputs: core.kl_penalty_forward(**inputs, kl_penalty=kind),
            lambda **inputs: ours.kl_penalty_forward(**inputs, kl_penalty=kind),
            arguments,
            wanted,
        )


@given(st.sampled_from([(5,), (3, 4)]), st.sampled_from([2, 17, 1024, 1500]), dtypes, st.booleans(), seeds)
@settings(NO_LIMIT, max_examples=40)
def test_logprobs_and_entropy(rows, vocabulary, dtype, sliced, seed):
    """Contiguous logits and a view of every second row, upstream gradients of each token's own."""
    torch.manual_seed(seed)
    logits = (3 * torch.randn(2 * rows[0], *rows[1:], vocabulary)).to(dtype)
    logits = logits[::2] if sliced else logits[: rows[0]].contiguous()
    labels = torch.randint(0, vocabulary, rows)
    labelled, alone = {"logits": logits, "labels": labels}, {"logits": logits}
    for name in ("logprobs_from_logits", "logprobs_from_logits_naive", "logprobs_from_logits_v2"):
        compare(getattr(functional, name), ours.logprobs_from_logits, labelled, ("logits",))
    formula = functional.entropy_from_logits
    compare(formula, ours.entropy_from_logits, alone, ("logits",), rule=assert_no_worse_than)
    if len(rows) == 1:
        theirs, function = functional.entropy_from_logits_with_chunking, ours.entropy_from_logits_with_chunking
        compare(theirs, function, alone, ("logits",), formula, assert_no_worse_than)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_entropy_loss(mode, dtype):
    logits, mask = (2 * torch.randn(3, 7, 50)).to(dtype), torch.rand(3, 7) < 0.6
    compare(
        lambda **inputs: core.compute_entropy_loss(**inputs, loss_agg_mode=mode),
        lambda **inputs: ours.compute_entropy_loss(**inputs, loss_agg_mode=mode),
        {"logits": logits, "response_mask": mask},
        ("logits",),
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(6,), (2, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_linear(dtype, shape, temperature):
    """Frozen hidden states and a frozen head too; labels of int32, as verl turns them into int64."""
    hidden, weight = torch.randn(*shape, 24).to(dtype), (torch.randn(70, 24) / 5).to(dtype)
    labels = torch.randint(0, 70, shape, dtype=torch.int32)
    arguments = {"hidden_states": hidden, "vocab_weights": weight, "input_ids": labels, "temperature": temperature}
    theirs, function = fused.FusedLinearForPPO(chunk_size=4), ours.FusedLinearForPPO(chunk_size=4)
    for wanted in (("hidden_states", "vocab_weights"), ("hidden_states",), ("vocab_weights",), ()):
        compare(theirs, function, arguments, wanted)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_cross_entropy(dtype, reduction):
    """verl's kernel needs a GPU; its formula does not."""

    def formula(hidden, weight, labels, temperature):
        logits = (
            (hidden @ weight.T).flatten(0, 1).float() / temperature
            if hidden.dtype != torch.float64
            else ((hidden @ weight.T).flatten(0, 1) / temperature)
        )
        logprobs, entropy = reference_logprobs(logits, labels.flatten(), return_entropy=True)
        return {"none": logprobs, "sum": logprobs.sum(), "mean": logprobs.mean()}[reduction], entropy

    hidden, weight = torch.randn(2, 5, 24).to(dtype), (torch.randn(70, 24) / 5).to(dtype)
    arguments = {"hidden": hidden, "weight": weight, "labels": torch.randint(0, 70, (2, 5)), "temperature": 0.7}
    compare(
        formula,
        lambda hidden, weight, labels, temperature: ours.linear_cross_entropy(
            hidden, weight, labels, temperature, reduction
        ),
        arguments,
        ("hidden", "weight"),
    )


@pytest.mark.parametrize("mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("kind", POLICY_LOSSES)
def test_float64(kind, mode):
    """Losses and gradients to fp64's last digits; verl's means divide by n + 1e-8, ours by n."""
    arguments = cast(tokens((4, 30), torch.bool, 3), torch.float64)
    settings = {"loss_agg_mode": mode, "config": actor(clip_ratio_c=2.5)}
    name = f"compute_policy_loss_{kind}"

    def loss_of(module):
        return lambda **inputs: getattr(module, name)(**inputs, **settings)[0]

    compare(loss_of(core), loss_of(ours), arguments, ("log_prob",))
    theirs, metrics = (getattr(module, name)(**arguments, **settings)[1] for module in (core, ours))
    assert metrics == pytest.approx(theirs)


def test_float64_elsewhere():
    made = cast(tokens((4, 30), torch.bool, 3), torch.float64)
    logits, labels = torch.randn(6, 40, dtype=torch.float64), torch.randint(0, 40, (6,))
    compare(
        functional.logprobs_from_logits, ours.logprobs_from_logits, {"logits": logits, "labels": labels}, ("logits",)
    )
    compare(functional.entropy_from_logits, ours.entropy_from_logits, {"logits": logits}, ("logits",))
    policies = {"logprob": made["log_prob"], "ref_logprob": made["old_log_prob"], "kl_penalty": "k2"}
    compare(core.kl_penalty, ours.kl_penalty, policies, ("logprob",))
    gae = {
        "token_level_rewards": made["advantages"],
        "values": made["log_prob"],
        "response_mask": made["response_mask"].long(),
    }
    theirs, got = (module.compute_gae_advantage_return(**gae, gamma=0.9, lam=0.8) for module in (core, ours))
    assert got[0].dtype == got[1].dtype == torch.float64
    for a, b in zip(got, theirs, strict=True):
        assert a.flatten().tolist() == pytest.approx(b.flatten().tolist())


NOWHERE = torch.zeros(2, 5, dtype=torch.bool)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nothing_under_the_mask_is_looked_at(value, mode):
    """verl's sequence modes multiply by the mask: NaN. Here loss and gradients are those of clean memory, or with strict=True refused."""
    clean = tokens((3, 9), torch.bool, 1)
    mask = clean["response_mask"]
    dirty = {name: x if name == "response_mask" else x.masked_fill(~mask, value) for name, x in clean.items()}
    for kind in POLICY_LOSSES:
        function = getattr(ours, f"compute_policy_loss_{kind}")
        settings = {"loss_agg_mode": mode, "config": actor()}

        def loss_of(function=function, settings=settings, **inputs):
            return function(**inputs, **settings)[0]

        for a, b in zip(*(outputs_of(loss_of, inputs, ("log_prob",)) for inputs in (clean, dirty)), strict=True):
            assert torch.equal(a[0], b[0])
        with pytest.raises(ValueError, match="old_log_prob under the mask is not finite.*strict=True leaves"):
            function(**dirty, **settings, strict=True)
    aggregated = [
        outputs_of(
            lambda loss_mat: ours.agg_loss(loss_mat, mask, mode), {"loss_mat": inputs["log_prob"]}, ("loss_mat",)
        )
        for inputs in (clean, dirty)
    ]
    assert torch.equal(aggregated[0][0][0], aggregated[1][0][0]) and torch.equal(
        aggregated[0][1][0], aggregated[1][1][0]
    )
    with pytest.raises(ValueError, match="loss_mat under the mask"):
        ours.agg_loss(dirty["log_prob"], mask, mode, strict=True)
    with pytest.raises(ValueError, match="vpreds under the mask"):
        ours.compute_value_loss(
            dirty["log_prob"], clean["advantages"], clean["old_log_prob"], mask, 0.2, mode, strict=True
        )


def test_gae_beside_dirty_memory():
    """verl multiplies by the mask, so that one NaN there makes every advantage NaN."""
    clean = tokens((3, 9), torch.int64, 1)
    mask, arguments = clean["response_mask"], {"gamma": 0.9, "lam": 0.8}
    rewards, values = clean["advantages"], clean["old_log_prob"]
    dirty = values.masked_fill(mask == 0, torch.nan)
    assert core.compute_gae_advantage_return(rewards, dirty, mask, **arguments)[0].isnan().all()
    expected = ours.compute_gae_advantage_return(rewards, values, mask, **arguments)
    got = ours.compute_gae_advantage_return(rewards, dirty, mask, **arguments)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1][mask == 1], expected[1][mask == 1])
    with pytest.raises(ValueError, match="values under the mask is not finite"):
        ours.compute_gae_advantage_return(rewards, dirty, mask, **arguments, strict=True)


@pytest.mark.parametrize("mode", MODES)
def test_no_token_at_all(mode):
    """A micro-batch without an action adds 0 to the loss, not NaN; with strict=True it is left to verl."""
    x = torch.randn(2, 5, requires_grad=True)
    for function in (
        lambda **strict: ours.agg_loss(x, NOWHERE, mode, **strict),
        lambda **strict: ours.compute_value_loss(x, x.detach(), x.detach(), NOWHERE, 0.2, mode, **strict)[0],
        lambda **strict: ours.compute_policy_loss_vanilla(x.detach(), x, x.detach(), NOWHERE, mode, actor(), **strict)[
            0
        ],
        lambda **strict: ours.compute_entropy_loss(x[..., None], NOWHERE, mode, **strict),
    ):
        loss = function()
        (gradient,) = torch.autograd.grad(loss, x)
        assert loss == 0 and not gradient.any()
        with pytest.raises(ValueError, match="the mask keeps nothing"):
            function(strict=True)


@pytest.mark.parametrize("name", ["entropy_from_logits", "entropy_from_logits_with_chunking"])
def test_entropy_beside_minus_infinity(name):
    """A token that is ruled out adds nothing to the entropy: verl's 0 * -inf is NaN."""
    logits, function = torch.randn(4, 9), getattr(ours, name)
    barred = torch.cat([logits, torch.full((4, 3), -torch.inf)], 1).requires_grad_()
    assert getattr(functional, name)(barred).isnan().all()
    entropy = function(barred)
    entropy.sum().backward()
    assert_as_exact_as_native(entropy, function(logits), functional.entropy_from_logits(logits.double()))
    assert barred.grad.isfinite().all() and not barred.grad[:, 9:].any()
    with pytest.raises(ValueError, match="logits is not finite"):
        function(barred, strict=True)


def test_a_sum_of_logprobs_as_upstream_gradient():
    """Its gradient is one number expanded over all tokens, and labels may be int32."""
    logits, labels = torch.randn(6, 30), torch.randint(0, 30, (6,))
    expected, got = (
        torch.autograd.grad(function(leaf := logits.clone().requires_grad_(), kind).sum(), leaf)[0]
        for function, kind in ((functional.logprobs_from_logits, labels), (ours.logprobs_from_logits, labels.int()))
    )
    exact = torch.autograd.grad(
        functional.logprobs_from_logits(leaf := logits.double().requires_grad_(), labels).sum(), leaf
    )[0]
    assert_as_exact_as_native(got, expected, exact)


def test_logits_are_not_overwritten():
    """verl writes over them with flash-attention alone; here is none, and another reader of the logits needs them."""
    logits, labels = torch.randn(6, 30, requires_grad=True), torch.randint(0, 30, (6,))
    scaled = logits * 2
    before = scaled.detach().clone()
    ours.logprobs_from_logits(scaled, labels, inplace_backward=True).sum().backward()
    assert torch.equal(scaled, before)


POLICY = tokens((2, 5), torch.float32, 0)
WEIGHTS = POLICY["rollout_is_weights"]
ONES, LEAF = torch.ones(2, 5), torch.ones(2, 5, requires_grad=True)


def vanilla(**changes):
    return ours.compute_policy_loss_vanilla(**{**POLICY, "config": actor(), **changes})


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: vanilla(response_mask=ONES / 2), "mask holds other numbers than 0 and 1"),
        (lambda: vanilla(old_log_prob=LEAF), "old_log_prob requires a gradient"),
        (lambda: vanilla(advantages=LEAF), "advantages requires a gradient"),
        (lambda: vanilla(rollout_is_weights=WEIGHTS - 3), "rollout_is_weights has 0, a negative number"),
        (lambda: vanilla(rollout_is_weights=WEIGHTS[0]), "rollout_is_weights has shape"),
        (lambda: vanilla(config=None), "config is NoneType, expected an actor's config"),
        (lambda: vanilla(config=actor(clip_ratio_c=1.0)), "dual_clip is 1.0"),
        (lambda: vanilla(config=actor(global_batch_info={"dp_size": 2})), "dp_size is 2, expected 1 without"),
        (lambda: vanilla(config=actor(global_batch_info={"horizon": 2})), "unexpected keyword argument 'horizon'"),
        (lambda: vanilla(loss_agg_mode="mean"), "loss_agg_mode is 'mean'"),
        (lambda: ours.compute_policy_loss_gspo(ONES - 12, ONES, -ONES, ONES, config=actor()), r"less than exp\(10\)"),
        (lambda: ours.compute_value_loss(ONES, LEAF, ONES, ONES, 0.2), "returns requires a gradient"),
        (lambda: ours.compute_value_loss(ONES, ONES, ONES, ONES, torch.tensor(0.2)), "value_clip is"),
        (lambda: ours.agg_loss(ONES.int(), ONES, "token-mean"), "dtype torch.int32"),
        (lambda: ours.agg_loss(ONES, ONES[0], "token-mean"), "mask has shape"),
        (lambda: ours.agg_loss(ONES, ONES, "token-mean-norm"), "token-mean-norm"),
        (lambda: ours.kl_penalty(ONES, ONES, "abs+"), "kind is 'abs\\+'"),
        (lambda: ours.kl_penalty(ONES, ONES, "full"), "kind is 'full'"),
        (lambda: ours.kl_penalty_forward(ONES, ONES, "k3+"), "expected a kind without"),
        (lambda: ours.masked_mean(ONES, ONES, axis=-1), "axis is -1"),
        (lambda: ours.masked_whiten(LEAF, ONES), "values requires a gradient"),
        (lambda: ours.masked_whiten(ONES, NOWHERE), "keeps 0 elements, expected at least 2"),
        (lambda: ours.compute_gae_advantage_return(ONES, ONES, ONES, torch.tensor(1.0), 1.0), "gamma is"),
        (lambda: ours.logprobs_from_logits(ONES, torch.tensor([1, -100])), "labels"),
        (lambda: ours.entropy_from_logits_with_chunking(ONES[None]), r"expected \[N, V\]"),
        (
            lambda: ours.linear_cross_entropy(ONES, ONES, torch.zeros(2).long(), 1.0, "none", object()),
            "dist_process_group",
        ),
        (lambda: ours.linear_cross_entropy(ONES, ONES, torch.zeros(2).long(), 1.0, "avg"), "reduction is 'avg'"),
        (lambda: ours.FusedLinearForPPO()(ONES, ONES, torch.zeros(2).long(), torch.ones(2)), "temperature is"),
        (
            lambda: ours.agg_loss(torch.nested.nested_tensor([ONES[0]], layout=torch.jagged), ONES, "token-mean"),
            "loss_mat is NestedTensor",
        ),
    ],
)
def test_what_is_left_to_verl(call, message):
    """A refusal is a TypeError or ValueError, which the patch catches."""
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_configs_of_every_kind():
    """An actor's dataclass, or what OmegaConf makes of YAML."""
    options = {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": 0.3, "global_batch_info": {"dp_size": 1}}
    from_yaml = omegaconf.OmegaConf.create(options)
    expected = core.compute_policy_loss_vanilla(**POLICY, config=from_yaml)
    got = ours.compute_policy_loss_vanilla(**POLICY, config=from_yaml)
    assert got[0].item() == pytest.approx(expected[0].item()) and got[1] == pytest.approx(expected[1])


@pytest.fixture
def patched():
    with ours.patch():
        yield


HOLDERS = {
    "verl.workers.utils.losses": ("agg_loss", "kl_penalty", "compute_value_loss", "masked_mean"),
    "verl.trainer.distillation.losses": ("agg_loss", "kl_penalty"),
    "verl.workers.engine.fsdp.transformer_impl": ("logprobs_from_logits",),
}


def holders() -> dict[tuple[str, str], Callable]:
    """Who holds a function that is replaced: losses, engines, verl's tables, the modules where they stand."""
    held = {
        (name, function): getattr(import_module(name), function)
        for name, functions in HOLDERS.items()
        for function in functions
    }
    held |= {("policy losses", kind): core.POLICY_LOSS_REGISTRY[kind] for kind in POLICY_LOSSES}
    held["estimators", "gae"] = core.ADV_ESTIMATOR_REGISTRY["gae"]
    return held | {
        tuple(one.target.split(":")): getattr(import_module(one.target.split(":")[0]), one.target.split(":")[1])
        for one in ours.REPLACEMENTS
        if "." not in one.target.split(":")[1]
    }


def test_verls_own_modules_see_ours_and_get_theirs_back():
    before, table, forward = holders(), dict(core.POLICY_LOSS_REGISTRY), fused.FusedLinearForPPO.forward
    with ours.patch() as patch:
        assert len(patch) == len(ours.REPLACEMENTS)
        for place, function in holders().items():
            assert function.__wrapped__ is before[place], place
        assert fused.FusedLinearForPPO.forward.__wrapped__ is forward
        assert core.get_policy_loss_fn("fastppo") is core.compute_policy_loss_vanilla
    assert holders() == before and core.POLICY_LOSS_REGISTRY == table and fused.FusedLinearForPPO.forward is forward


def test_a_trainers_step_with_ours(patched, caplog):
    """verl's own loss of an actor: our terms, added to in place as it does, their gradients, and no call left to verl."""
    td = pytest.importorskip("tensordict").TensorDict
    lengths, prompts = [3, 5], [2, 1]
    total = sum(lengths) + sum(prompts)
    log_probs, entropy = torch.randn(total) - 2, torch.rand(total)
    data = {
        "prompts": torch.nested.nested_tensor([torch.zeros(n).long() for n in prompts], layout=torch.jagged),
        "responses": torch.nested.nested_tensor([torch.zeros(n).long() for n in lengths], layout=torch.jagged),
    }
    for name in ("response_mask", "old_log_probs", "advantages", "ref_log_prob", "rollout_is_weights"):
        rows = [torch.ones(n).long() if name == "response_mask" else torch.rand(n) + 0.1 for n in lengths]
        data[name] = torch.nested.nested_tensor(rows, layout=torch.jagged)
    batch = td(data, batch_size=[2])
    from verl.utils import tensordict_utils

    tensordict_utils.assign_non_tensor(batch, dp_size=2, batch_num_tokens=16, global_batch_size=4)
    config = actor(use_kl_loss=True, entropy_coeff=0.01)

    def step():
        leaf, bonus = log_probs.clone().requires_grad_(), entropy.clone().requires_grad_()
        loss, metrics = losses.ppo_loss(config, {"log_probs": leaf, "entropy": bonus}, batch)
        loss.backward()
        return loss.detach(), leaf.grad, bonus.grad, sorted(metrics)

    with caplog.at_level(logging.WARNING, "fastppo.integrations"):
        got = step()
    assert not caplog.records
    ours.unpatch()
    for a, b in zip(got[:3], step()[:3], strict=True):
        assert a.flatten().tolist() == pytest.approx(b.flatten().tolist(), nan_ok=False)
    assert got[3] == step()[3]


def test_what_ours_refuses_runs_as_verl_has_it(caplog):
    """The same bits as without a patch, said once; its own errors stay its own."""
    weighing = {**POLICY, "response_mask": ONES / 2, "config": actor()}
    expected = core.compute_policy_loss_vanilla(**weighing)
    with caplog.at_level(logging.WARNING, "fastppo.integrations"), ours.patch():
        for _ in range(2):
            loss, metrics = core.compute_policy_loss_vanilla(**weighing)
            assert torch.equal(loss, expected[0]) and metrics == expected[1]
        with pytest.raises(AssertionError):
            core.compute_policy_loss_vanilla(**{**weighing, "config": None})
        with pytest.raises(NotImplementedError):
            core.kl_penalty(ONES, ONES, "full")
        assert torch.equal(core.kl_penalty(ONES, ONES, "abs+"), torch.zeros(2, 5))
    vanilla = [x for x in caplog.records if "compute_policy_loss_vanilla" in x.getMessage()]
    assert len(vanilla) == 1 and "mask holds other numbers than 0 and 1" in vanilla[0].getMessage()


def test_a_patched_head(patched):
    """verl makes an instance of its own class for each forward pass."""
    hidden, weight, labels = torch.randn(3, 8), torch.randn(20, 8), torch.randint(0, 20, (3,))
    expected = ours.FusedLinearForPPO()(hidden, weight, labels)
    for backend in ("torch", "liger"):
        got = fused.FusedLinearForPPO(impl_backend=backend).forward(hidden, weight, labels, temperature=1.0)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_strict_gives_verls_own_nan():
    with ours.patch():
        assert core.agg_loss(ONES, NOWHERE, "token-mean") == 0
    with ours.patch(strict=True):
        assert core.agg_loss(ONES, NOWHERE, "token-mean").isnan()
        barred = torch.tensor([[0.0, -torch.inf]])
        assert functional.entropy_from_logits(barred).isnan()
        assert core.agg_loss(ONES, ONES, "token-mean") == 1


def test_register_alone_adds_a_loss_and_changes_nothing_else():
    """For `policy_loss.loss_mode=fastppo` without a patch; it outlives a patch that comes and goes."""
    before = holders()
    ours.register()
    try:
        function = core.get_policy_loss_fn("fastppo")
        assert holders() == before
        got, expected = (f(**POLICY, config=actor()) for f in (function, core.compute_policy_loss_vanilla))
        assert got[0].item() == pytest.approx(expected[0].item()) and got[1] == pytest.approx(expected[1])
        weighing = {**POLICY, "response_mask": ONES / 2, "config": actor()}
        assert torch.equal(function(**weighing)[0], core.compute_policy_loss_vanilla(**weighing)[0])
        with ours.patch():
            assert core.get_policy_loss_fn("fastppo") is function
        assert core.get_policy_loss_fn("fastppo") is function
    finally:
        del core.POLICY_LOSS_REGISTRY["fastppo"]


def test_entropy_compiles_as_verls_engines_compile_it(patched):
    compiled = torch.compile(functional.entropy_from_logits, dynamic=True, backend="aot_eager")
    for rows in (3, 5):
        logits = torch.randn(rows, 20, requires_grad=True)
        entropy = compiled(logits)
        assert torch.equal(entropy, ours.entropy_from_logits(logits))
        entropy.sum().backward()


def run(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_functions_need_no_verl():
    """Who has not installed it can call them all the same."""
    run(
        "-c",
        "import sys; sys.modules['verl'] = None\n"
        "import torch; from fastppo.integrations import verl\n"
        "x = torch.ones(2, 5); assert verl.agg_loss(x, x > -9, 'token-mean') == 1\n"
        "verl.logprobs_from_logits(x, torch.zeros(2).long())",
    )


@pytest.mark.slow
def test_every_process_of_a_run_can_patch(tmp_path):
    """verl imports the modules that VERL_USE_EXTERNAL_MODULES names, in its workers too."""
    (tmp_path / "with_fastppo.py").write_text("from fastppo.integrations import verl\n\nverl.patch()\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = "import verl.workers.utils.losses as losses; print(losses.agg_loss.__wrapped__.__module__)"
    out = run("-c", command, PYTHONPATH=path, VERL_USE_EXTERNAL_MODULES="with_fastppo")
    assert out.split()[-1] == "verl.trainer.ppo.core_algos"


VERL_TESTS = ["core_algos", "loss_aggregation", "value_loss_normalization", "dynamic_policy_losses"]


@pytest.mark.slow
def test_verls_own_tests_pass_with_ours():
    """Those of its losses and estimators, from a checkout of its repository at v0.9: VERL_TESTS names its folder `tests`."""
    folder = Path(os.environ.get("VERL_TESTS", Path(__file__).parents[3] / "verl" / "tests"))
    files = [folder / "trainer" / "ppo" / f"test_{name}_on_cpu.py" for name in VERL_TESTS]
    missing = [str(file) for file in files if not file.exists()]
    if missing:
        pytest.skip(f"no {missing[0]}: VERL_TESTS names no folder of verl's tests")
    command = (
        "import sys, pytest; from fastppo.integrations import verl; verl.patch(); sys.exit(pytest.main(sys.argv[1:]))"
    )
    run("-c", command, "-q", "-p", "no:cacheprovider", "--rootdir", str(folder.parent), *map(str, files))
