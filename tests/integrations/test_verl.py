"""verl's functions beside ours: values, gradients, dtypes, masks. Exact is verl's own formula in fp64."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo.integrations import verl as ours
from fastppo.reference.token_logprobs import token_logprobs as reference_logprobs
from tests.cases import DTYPES
from tests.integrations.verl_inputs import NOWHERE, POLICY_LOSSES, actor, tokens
from tests.tolerance import assert_as_exact_as_native, assert_no_worse_than

core = pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed")
functional = pytest.importorskip("verl.utils.torch_functional")
fused = pytest.importorskip("verl.utils.experimental.torch_functional")
losses = pytest.importorskip("verl.workers.utils.losses")

MODES = ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
MASKS = [torch.bool, torch.int64, torch.float32]
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
