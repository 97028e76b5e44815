"""Ours against Liger-Kernel's own functions on the same inputs: values, types and gradients, what is refused, and the patched package.

What Liger does in plain PyTorch runs here; its Triton kernels run in the interpreter, in a process of its own (`liger_triton.py`).
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo.integrations import liger as ours
from tests.cases import seeded
from tests.tolerance import assert_as_exact_as_native

pytest.importorskip("liger_kernel", reason="Liger-Kernel is not installed (make peers)")

ROOT = Path(__file__).resolve().parents[2]
repeatable = settings(derandomize=True, deadline=None, max_examples=30)
SHAPES = [(1, 1, 3, 5), (2, 5, 8, 17), (3, 9, 16, 70)]  # B, T, H, V
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def theirs():
    """Liger's modules, which stay imported: other packages hold them too."""
    from liger_kernel import ops, transformers
    from liger_kernel.chunked_loss import fused_linear_ppo, grpo_loss
    from liger_kernel.transformers import functional
    from liger_kernel.transformers import grpo_loss as triton_grpo

    modules = {"ops": ops, "transformers": transformers, "functional": functional, "triton_grpo": triton_grpo}
    yield SimpleNamespace(base=fused_linear_ppo.LigerFusedLinearPPOBase, grpo=grpo_loss, **modules)
    ours.unpatch()


def normal(shape, dtype, seed: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=seeded(seed)) * scale).to(dtype)


def flat(results) -> list[Tensor]:
    return [x for result in results for x in (result if isinstance(result, tuple | list) else [result])]


def run(function, inputs: dict, wanted: list[str]) -> list[Tensor]:
    """The results, and the gradients of the `wanted` inputs for a random gradient of the differentiable results."""
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in wanted}
    results = function(**inputs | leaves)
    results = flat(results if isinstance(results, tuple) else [results])
    differentiable = [x for x in results if x.requires_grad]
    weights = [normal(x.shape, x.dtype, 7 + i) for i, x in enumerate(differentiable)]
    torch.autograd.backward(differentiable, weights)
    return [x.detach() for x in results] + [leaf.grad for leaf in leaves.values()]


def compare(ours: list[Tensor], native: list[Tensor], exact: list[Tensor]) -> None:
    assert len(ours) == len(native) == len(exact)
    for place, (a, b, c) in enumerate(zip(ours, native, exact, strict=True)):
        assert a.dtype == b.dtype, f"result {place}: {a.dtype}, theirs {b.dtype}"
        assert_as_exact_as_native(a, b, c.double(), f"result {place}")


def widened(inputs: dict) -> dict:
    return {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()}


# GRPO's loss from hidden states


def exactly(theirs, loss) -> object:
    """Their loss with log-probabilities in fp64: they would be fp32 whatever the inputs are."""

    def chunk_forward(hidden, weight, ids, bias=None, temperature=1.0):
        logits = hidden @ weight.T + (0 if bias is None else bias)
        return (logits / temperature).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)

    def function(**inputs):
        with (
            mock.patch.object(theirs.base, "chunk_forward", chunk_forward),
            mock.patch.object(Tensor, "float", Tensor.double),
        ):
            return loss(**inputs)

    return function


def hidden_states(shape, dtype, seed: int, with_bias: bool) -> dict:
    batch, length, width, vocabulary = shape
    made = {
        "_input": normal((batch, length, width), dtype, seed),
        "lin_weight": normal((vocabulary, width), dtype, seed + 1, width**-0.5),  # logits of about 1, as a model's
    }
    made["selected_token_ids"] = torch.randint(0, vocabulary, (batch, length), generator=seeded(seed))
    made["bias"] = normal((vocabulary,), dtype, seed + 2) if with_bias else None
    return made


def batch_of(shape, dtype, seed: int, with_bias: bool, mask_dtype=torch.int64) -> dict:
    """Old and reference log-probs near the policy's, so that ratios lie in and out of the clip range."""
    made = hidden_states(shape, dtype, seed, with_bias)
    logits = made["_input"].float() @ made["lin_weight"].float().T + (
        0 if made["bias"] is None else made["bias"].float()
    )
    logprobs = logits.log_softmax(-1).gather(-1, made["selected_token_ids"].unsqueeze(-1)).squeeze(-1)
    mask = torch.rand(logprobs.shape, generator=seeded(seed)) < 0.7
    mask[-1, 0] = True
    made |= {"attention_mask": mask.to(mask_dtype), "advantages": normal(shape[:1], torch.float32, seed + 3)}
    made["old_per_token_logps"] = logprobs + normal(logprobs.shape, torch.float32, seed + 4, 0.3)
    made["ref_per_token_logps"] = logprobs + normal(logprobs.shape, torch.float32, seed + 5, 0.5)
    return made


def weights_like(mask: Tensor, kind: str | None, seed: int) -> Tensor | None:
    shapes = {"token": mask.shape, "sequence": (len(mask), 1), "vector": (len(mask),)}
    return None if kind is None else torch.rand(shapes[kind], generator=seeded(seed)) * 2


@settings(repeatable, max_examples=100)
@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
    mask_dtype=st.sampled_from([torch.bool, torch.int64, torch.float32]),
    with_bias=st.booleans(),
    loss_type=st.sampled_from(ours.LOSS_TYPES),
    level=st.sampled_from(ours.LEVELS),
    temperature=st.sampled_from([1.0, 0.7]),
    beta=st.sampled_from([0.0, 0.1]),
    old=st.booleans(),
    delta=st.sampled_from([None, 1.1, 1.5]),
    ratio=st.sampled_from([None, "token", "sequence", "vector"]),
    bias_corrected=st.booleans(),
    items=st.sampled_from([None, 11, torch.tensor(7)]),
    frozen=st.sampled_from([None, "_input", "lin_weight"]),
    strict=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_grpo_loss(
    theirs, shape, dtype, mask_dtype, with_bias, loss_type, level, temperature, beta, old, delta, ratio, bias_corrected,
    items, frozen, strict, seed,
):  # fmt: skip
    """Every option that is served, alone and together: loss, metrics and the three gradients."""
    inputs = batch_of(shape, dtype, seed, with_bias, mask_dtype) | {"num_items_in_batch": items}
    inputs["vllm_is_ratio"] = weights_like(inputs["attention_mask"], ratio, seed + 6)
    if not old:
        inputs["old_per_token_logps"] = None
    cispo = loss_type == "cispo"
    options = {"loss_type": loss_type, "importance_sampling_level": "token" if cispo else level, "delta": delta}
    options |= {
        "beta": beta,
        "temperature": temperature,
        "use_bias_correction_kl": bias_corrected,
        "max_completion_length": 20,
    }
    options |= {"epsilon_high": 1.2 if cispo else 0.3, "compiled": False, "chunk_size": shape[0]}
    wanted = [name for name in ("_input", "lin_weight", "bias") if inputs[name] is not None and name != frozen]
    loss = theirs.grpo.LigerFusedLinearGRPOLoss(**options)
    found = run(ours.LigerFusedLinearGRPOLoss(**options), inputs | {"strict": strict}, wanted)
    compare(found, run(loss, inputs, wanted), run(exactly(theirs, loss), widened(inputs), wanted))


@pytest.mark.parametrize("gap", ["old", "ref"])
@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_no_clamp_of_ours_shows(theirs, gap, loss_type):
    """`linear_ppo_loss` clamps log-ratios and the KL; theirs clamps neither, and neither does this loss."""
    inputs = batch_of((2, 5, 8, 17), torch.float32, 0, False)
    inputs["attention_mask"][:] = 1
    inputs["advantages"] = -inputs["advantages"].abs()
    inputs[f"{gap}_per_token_logps"][0, 2] += -25.0 if gap == "old" else 4.0
    options = {"beta": 0.1, "loss_type": loss_type, "epsilon_high": 2.0, "compiled": False, "chunk_size": 2}
    loss, wanted = theirs.grpo.LigerFusedLinearGRPOLoss(**options), ["_input", "lin_weight"]
    found = run(ours.LigerFusedLinearGRPOLoss(**options), inputs, wanted)
    compare(found, run(loss, inputs, wanted), run(exactly(theirs, loss), widened(inputs), wanted))


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("use_ref_model", [False, True])
def test_grpo_loss_with_a_reference_model(theirs, beta, use_ref_model):
    """The reference's log-probs are made here from its hidden states, or, without one, the KL is 0."""
    inputs = batch_of((2, 5, 8, 17), torch.float32, 0, True)
    inputs["ref_per_token_logps"] = None
    if use_ref_model:
        other = hidden_states((2, 5, 8, 17), torch.float32, 5, True)
        inputs |= {"ref_input": other["_input"] * 0.3, "ref_weight": other["lin_weight"], "ref_bias": other["bias"]}
    options = {"beta": beta, "use_ref_model": use_ref_model, "compiled": False, "chunk_size": 2, "loss_type": "grpo"}
    loss, wanted = theirs.grpo.LigerFusedLinearGRPOLoss(**options), ["_input", "lin_weight", "bias"]
    found = run(ours.LigerFusedLinearGRPOLoss(**options), inputs, wanted)
    compare(found, run(loss, inputs, wanted), run(exactly(theirs, loss), widened(inputs), wanted))


@pytest.mark.parametrize("options", [{}, {"use_bias_correction_kl": True}, {"loss_type": "grpo"}])
def test_what_the_mask_hides_reaches_nothing_but_for_strict(theirs, options):
    """Theirs multiplies by the mask: NaN there is the loss."""
    inputs = batch_of((2, 5, 8, 17), torch.float32, 0, False)
    inputs["attention_mask"][0, 3:] = 0
    options = {"compiled": False} | options
    clean = run(ours.LigerFusedLinearGRPOLoss(**options), inputs, ["_input", "lin_weight"])
    for name in ("old_per_token_logps", "ref_per_token_logps", "_input"):
        inputs[name][0, 4] = torch.nan
    assert ours.LigerFusedLinearGRPOLoss(**options)(**inputs, strict=True)[0].isnan()
    inputs["selected_token_ids"][0, 4] = -100
    assert theirs.grpo.LigerFusedLinearGRPOLoss(**options)(**inputs)[0].isnan()
    dirty = run(ours.LigerFusedLinearGRPOLoss(**options), inputs, ["_input", "lin_weight"])
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def test_nothing_unmasked(theirs):
    inputs = batch_of((2, 5, 8, 17), torch.float32, 0, False)
    inputs["attention_mask"][:] = 0
    for loss_type in ours.LOSS_TYPES:
        options = {"loss_type": loss_type, "compiled": False, "max_completion_length": 5}
        for loss in (ours.LigerFusedLinearGRPOLoss(**options), theirs.grpo.LigerFusedLinearGRPOLoss(**options)):
            assert all((x == 0).all() for x in run(loss, inputs, ["_input", "lin_weight"]))


def test_processes_share_their_count_of_tokens(theirs, tmp_path):
    """As theirs does, with one process here."""
    inputs = batch_of((2, 5, 8, 17), torch.float32, 0, False)
    expected = ours.LigerFusedLinearGRPOLoss()(**inputs)[0]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert torch.equal(ours.LigerFusedLinearGRPOLoss()(**inputs)[0], expected)
    finally:
        torch.distributed.destroy_process_group()


# Cross-entropies from hidden states


@repeatable
@given(
    rows=st.sampled_from([1, 5, 13]),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    temperature=st.sampled_from([1.0, 0.7]),
    return_entropy=st.booleans(),
    ignored=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_scaled_cross_entropy(theirs, rows, dtype, temperature, return_entropy, ignored, seed):
    target = torch.randint(0, 70, (rows,), generator=seeded(seed))
    if ignored:
        target[rows // 2] = 3
    inputs = {"_input": normal((rows, 16), dtype, seed), "weight": normal((70, 16), dtype, seed + 1), "target": target}
    positional = (temperature, 3 if ignored else -100, 1, return_entropy)

    def of(function):
        return lambda _input, weight, target: function(_input, weight, target, *positional)

    def exact(_input, weight, target):
        logprobs = (_input @ weight.T / temperature).log_softmax(-1)
        keep = target != positional[1]
        nll = torch.where(keep, -logprobs.gather(-1, target[:, None])[:, 0], 0)
        entropy = torch.where(keep, -(logprobs.exp() * logprobs).sum(-1), 0)
        return (nll, entropy) if return_entropy else nll

    apply = theirs.ops.LigerFusedLinearScaledCrossEntropyFunction.apply
    wanted = ["_input", "weight"]
    if dtype == torch.float64:  # their results are fp32, and what they are made of
        inputs = {name: x.float().to(x.dtype) for name, x in inputs.items()}
    found, native = (run(of(f), inputs, wanted) for f in (ours.LigerFusedLinearScaledCrossEntropyFunction.apply, apply))
    compare(found, native, run(exact, widened(inputs), wanted))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_without_a_gpu(reduction, softcap, dtype):
    """Against PyTorch's own: Liger's kernels do not run here."""
    target = torch.randint(0, 70, (13,))
    target[[0, 5]] = -100
    inputs = {
        "_input": normal((13, 16), dtype, 0),
        "weight": normal((70, 16), dtype, 1),
        "bias": normal((70,), dtype, 2),
    }

    def plain(_input, weight, bias):
        logits = (_input @ weight.T + bias).to(torch.promote_types(_input.dtype, torch.float32))
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return torch.nn.functional.cross_entropy(logits, target, reduction=reduction)

    def fused(_input, weight, bias):
        apply = ours.LigerFusedLinearCrossEntropyFunction.apply
        loss, *others = apply(_input, weight, target, bias, reduction=reduction, softcap=softcap)
        assert others == [None, None, None]
        return loss

    found, native, exact = (run(f, x, [*x]) for f, x in ((fused, inputs), (plain, inputs), (plain, widened(inputs))))
    compare(found, native, exact)


def test_nothing_but_ignored_rows_is_no_loss():
    target = torch.full((4,), -100)
    loss = ours.LigerFusedLinearCrossEntropyFunction.apply(torch.ones(4, 3), torch.ones(5, 3), target)[0]
    assert loss == 0


@pytest.mark.slow
def test_triton_kernels_in_the_interpreter():
    """Cross-entropy and GRPO from logits against Liger's kernels; a process of its own, since Triton reads the switch at import."""
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        "-n0",
        "tests/integrations/liger_triton.py",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout


# What is refused


HIDDEN = {
    "_input": torch.zeros(2, 3, 4),
    "lin_weight": torch.zeros(5, 4),
    "selected_token_ids": torch.zeros(2, 3).long(),
}
HIDDEN |= {"attention_mask": torch.ones(2, 3), "advantages": torch.zeros(2), "ref_per_token_logps": torch.zeros(2, 3)}


@pytest.mark.parametrize(
    "options, changed, message",
    [
        ({"loss_type": "sapo"}, {}, "loss_type is 'sapo'"),
        ({"loss_type": "vespo"}, {}, "loss_type is 'vespo'"),
        ({"loss_type": "luspo"}, {}, "loss_type is 'luspo'"),
        ({"loss_type": "dr_grpo"}, {}, "max_completion_length is None"),
        ({"loss_type": "cispo", "importance_sampling_level": "sequence"}, {}, "loss_type is 'cispo'"),
        ({"importance_sampling_level": "word"}, {}, "importance_sampling_level is 'word'"),
        ({"epsilon_low": -0.1}, {}, "epsilon_low is -0.1"),
        ({}, {"ref_per_token_logps": None}, "ref_per_token_logps and ref_input are None"),
        ({}, {"advantages": torch.zeros(2, 3)}, "advantages has shape"),
        ({}, {"attention_mask": torch.full((2, 3), 0.5)}, "mask holds other numbers"),
        ({}, {"old_per_token_logps": torch.zeros(2, 1)}, "old log-probs has shape"),
        ({}, {"vllm_is_ratio": torch.zeros(3, 2)}, "vllm_is_ratio has shape"),
        ({}, {"selected_token_ids": torch.full((2, 3), 5)}, "label"),
        ({}, {"selected_token_ids": torch.zeros(6).long()}, "selected_token_ids has shape"),
        ({}, {"_input": torch.zeros(2, 3, 4).int()}, "hidden has dtype"),
    ],
)
def test_refused_grpo_losses(options, changed, message):
    """TypeError or ValueError, which the patch answers with their own function."""
    with pytest.raises((TypeError, ValueError), match=message):
        ours.LigerFusedLinearGRPOLoss(**options)(**HIDDEN | changed)


@pytest.mark.parametrize("options", [{"delta": 0.0}, {"sapo_temperature_pos": 0.0}, {"sapo_temperature_neg": -1.0}])
def test_options_that_theirs_refuses_too(theirs, options):
    for loss in (ours.LigerFusedLinearGRPOLoss, theirs.grpo.LigerFusedLinearGRPOLoss):
        with pytest.raises(ValueError):
            loss(**options)


@pytest.mark.parametrize(
    "changed",
    [
        {"ce_weight": torch.ones(5)},
        {"label_smoothing": 0.1},
        {"lse_square_scale": 0.1},
        {"return_z_loss": True},
        {"use_token_scaling": True},
        {"return_token_accuracy": True},
        {"return_predicted_tokens": True},
        {"ce_impl": "cutile"},
        {"accum_dtype": torch.float64},
        {"reduction": "batchmean"},
        {"chunk_mem_const": 0},
        {"_input": torch.zeros(2, 2, 4)},
        {"target": torch.tensor([0, 5])},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_refused_cross_entropies(changed):
    inputs = {"_input": torch.zeros(2, 4), "weight": torch.zeros(5, 4), "target": torch.tensor([0, 1])}
    with pytest.raises((TypeError, ValueError)):
        ours.LigerFusedLinearCrossEntropyFunction.apply(**inputs | changed)


def test_other_refused_calls():
    hidden, weight, target = torch.zeros(2, 4), torch.zeros(5, 4), torch.tensor([0, 1])
    scaled = ours.LigerFusedLinearScaledCrossEntropyFunction.apply
    logits, ids = torch.zeros(2, 4, 5), torch.zeros(2, 3).long()
    for call in (
        lambda: scaled(hidden, weight, target, selected_token_ids=target),
        lambda: scaled(hidden, weight, target, m_tiles_per_cluster=0),
        lambda: scaled(hidden, weight, target, return_entropy=1),
        lambda: scaled(hidden, weight, target, temperature=0.0),
        lambda: scaled(hidden[None], weight, target[None]),
        lambda: ours.triton_grpo_loss(logits, None, None, ids, torch.zeros(2)),
        lambda: ours.triton_grpo_loss(logits[:, 1:], None, None, ids, torch.zeros(2), beta=0.0),
        lambda: ours.triton_grpo_loss(logits, None, None, ids, torch.zeros(2), beta=0.0, loss_type="cispo", delta=2.0),
        lambda: ours.fused_selective_log_softmax(logits[0], ids[0]),
    ):
        with pytest.raises((TypeError, ValueError)):
            call()


# The patched package


def test_trainers_get_ours_and_then_their_own_back(theirs, monkeypatch):
    """Also a loss made before, and what `liger_fused_linear_cross_entropy` and the module of that loss call: on the CPU they run with ours."""
    inputs = batch_of((2, 5, 8, 17), torch.float32, 0, False)
    inputs["attention_mask"][0, 4] = 0
    inputs["old_per_token_logps"][0, 4] = torch.nan
    loss = theirs.grpo.LigerFusedLinearGRPOLoss(compiled=False)
    forward = vars(theirs.grpo.LigerFusedLinearGRPOLoss)["forward"]
    scaled = vars(theirs.ops.LigerFusedLinearScaledCrossEntropyFunction)["apply"]
    grpo = theirs.triton_grpo.triton_grpo_loss
    assert loss(**inputs)[0].isnan()
    with ours.patch() as patch:
        assert len(patch) == 5
        assert loss(**inputs)[0].isfinite()
        rows, weight, target = torch.randn(4, 8), torch.randn(17, 8), torch.tensor([0, 1, -100, 16])
        expected = torch.nn.functional.cross_entropy(rows @ weight.T, target)
        for found in (
            theirs.functional.liger_fused_linear_cross_entropy(rows, weight, target),
            theirs.transformers.LigerFusedLinearCrossEntropyLoss()(weight, rows, target),
        ):
            assert_as_exact_as_native(
                found, expected, torch.nn.functional.cross_entropy(rows.double() @ weight.double().T, target)
            )
        assert theirs.triton_grpo.triton_grpo_loss is not grpo
    assert vars(theirs.grpo.LigerFusedLinearGRPOLoss)["forward"] is forward
    assert vars(theirs.ops.LigerFusedLinearScaledCrossEntropyFunction)["apply"] is scaled
    assert "apply" not in vars(theirs.ops.LigerFusedLinearCrossEntropyFunction)
    assert theirs.triton_grpo.triton_grpo_loss is grpo
    assert loss(**inputs)[0].isnan()


def test_what_ours_refuses_runs_as_theirs(theirs, caplog):
    """A loss type that is theirs alone; it is said once."""
    inputs = batch_of((2, 5, 8, 17), torch.float32, 0, False)
    loss = theirs.grpo.LigerFusedLinearGRPOLoss(loss_type="sapo", compiled=False)
    expected = loss(**inputs)[0]
    with caplog.at_level(logging.WARNING), ours.patch():
        assert torch.equal(loss(**inputs)[0], expected) and torch.equal(loss(**inputs)[0], expected)
    assert len(caplog.records) == 1 and "loss_type is 'sapo'" in caplog.text
