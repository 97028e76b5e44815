"""Ours against Liger's Triton kernels in the interpreter; `test_liger.py` starts this in a process of its own, with TRITON_INTERPRET=1.

A row of logits takes the kernels a block of 2048 columns at a time; the interpreter lacks their softcap.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from liger_kernel import ops
from liger_kernel.ops.grpo_loss import fused_selective_log_softmax
from liger_kernel.transformers.grpo_loss import triton_grpo_loss

from fastppo.integrations import liger as ours
from tests.cases import seeded
from tests.integrations.test_liger import compare, normal, run, weights_like, widened

repeatable = settings(derandomize=True, deadline=None, max_examples=50)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_cross_entropy(reduction, dtype, with_bias):
    target = torch.randint(0, 70, (13,))
    target[[0, 5]] = -100
    inputs = {
        "_input": normal((13, 16), dtype, 0),
        "weight": normal((70, 16), dtype, 1),
        "bias": normal((70,), dtype, 2),
    }
    inputs = inputs if with_bias else {name: x for name, x in inputs.items() if name != "bias"}

    def of(function):
        def loss(_input, weight, bias=None):
            found = function(_input, weight, target, bias, None, -100, 0.0, 0.0, reduction)
            assert found[1:] == (None, None, None)
            return found[0]

        return loss

    def exact(_input, weight, bias=0):
        return torch.nn.functional.cross_entropy(_input @ weight.T + bias, target, reduction=reduction)

    functions = ours.LigerFusedLinearCrossEntropyFunction.apply, ops.LigerFusedLinearCrossEntropyFunction.apply
    found, native = (run(of(function), inputs, [*inputs]) for function in functions)
    compare(found, native, run(exact, widened(inputs), [*inputs]))


def logits_and_more(shape, dtype, seed: int, mask: str) -> dict:
    batch, length, vocabulary = shape
    made = {"logits": normal((batch, length + 1, vocabulary), dtype, seed)}
    made["completion_ids"] = torch.randint(0, vocabulary, (batch, length), generator=seeded(seed))
    logprobs = (
        made["logits"][:, :-1].float().log_softmax(-1).gather(-1, made["completion_ids"].unsqueeze(-1)).squeeze(-1)
    )
    made["old_logp"] = logprobs + normal(logprobs.shape, torch.float32, seed + 1, 0.3)
    made["ref_logp"] = logprobs + normal(logprobs.shape, torch.float32, seed + 2, 0.5)
    kept = torch.rand(logprobs.shape, generator=seeded(seed)) < 0.7
    made["completion_mask"] = None if mask == "none" else kept.to(torch.int64 if mask == "int64" else torch.float32)
    return made | {"advantages": normal(shape[:1], torch.float32, seed + 3)}


def plain_grpo_loss(
    logits, old_logp, ref_logp, completion_ids, advantages, completion_mask, temperature, beta, eps_low, eps_high,
    loss_type, importance_sampling_level, reduce, vllm_is_ratio, delta, use_bias_correction_kl, **_,
):  # fmt: skip
    """The loss as it is documented, in the type of the logits."""
    logp = (logits[:, :-1] / temperature).log_softmax(-1).gather(-1, completion_ids.unsqueeze(-1)).squeeze(-1)
    mask = torch.ones_like(logp) if completion_mask is None else completion_mask.to(logp.dtype)
    advantages, lengths = advantages.unsqueeze(1), mask.sum(1, keepdim=True).clamp(min=1)
    log_ratio = logp - (logp.detach() if old_logp is None else old_logp)
    if importance_sampling_level == "sequence":
        log_ratio = (log_ratio * mask).sum(1, keepdim=True) / lengths
    ratio = log_ratio.exp()
    if loss_type == "cispo":
        loss = -ratio.clamp(max=eps_high).detach() * advantages * logp
        clipped = (ratio > eps_high) & (advantages > 0)
    else:
        bounded = ratio if delta is None else ratio.clamp(max=delta)
        loss = -torch.minimum(bounded * advantages, ratio.clamp(1 - eps_low, 1 + eps_high) * advantages)
        clipped = (ratio > 1 + eps_high) & (advantages > 0) | (ratio < 1 - eps_low) & (advantages < 0)
    if vllm_is_ratio is not None:
        loss = loss * vllm_is_ratio.reshape(len(logp), -1)
    kl = None
    if beta != 0:
        kl = ((ref_logp - logp).exp() - 1 - (ref_logp - logp)) * (ratio if use_bias_correction_kl else 1)
        loss, kl = loss + beta * kl, (kl * mask).detach()
    loss, clipped = loss * mask, clipped * mask
    if not reduce:
        return tuple(x for x in (loss, kl, clipped) if x is not None)
    count = mask.sum().clamp(min=1)
    divided = {"grpo": (loss / lengths).sum() / len(mask), "dr_grpo": loss.sum() / mask.numel()}
    return (divided.get(loss_type, loss.sum() / count), *(x.sum() / count for x in (kl, clipped) if x is not None))


@repeatable
@given(
    shape=st.sampled_from([(1, 1, 5), (2, 4, 33)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    mask=st.sampled_from(["none", "int64", "float32"]),
    loss_type=st.sampled_from(ours.LOSS_TYPES),
    level=st.sampled_from(ours.LEVELS),
    beta=st.sampled_from([0.0, 0.1]),
    old=st.booleans(),
    delta=st.sampled_from([None, 1.1, 1.5]),
    ratio=st.sampled_from([None, "token", "sequence", "vector"]),
    bias_corrected=st.booleans(),
    reduce=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_grpo_loss(shape, dtype, mask, loss_type, level, beta, old, delta, ratio, bias_corrected, reduce, seed):
    """Per token and reduced, with gradients of either."""
    cispo = loss_type == "cispo"
    inputs = logits_and_more(shape, dtype, seed, mask) | {"loss_type": loss_type, "beta": beta, "reduce": reduce}
    inputs |= {"importance_sampling_level": "token" if cispo else level, "delta": None if cispo else delta}
    inputs |= {"vllm_is_ratio": weights_like(inputs["old_logp"], ratio, seed), "use_bias_correction_kl": bias_corrected}
    inputs |= {"temperature": 0.9, "eps_low": 0.2, "eps_high": 1.2 if cispo else 0.3, "inplace": False}
    if not old:
        inputs["old_logp"] = None

    def of(function):
        return lambda **inputs: tuple(x for x in function(**inputs) if x is not None)

    found, native = (run(of(function), inputs, ["logits"]) for function in (ours.triton_grpo_loss, triton_grpo_loss))
    compare(found, native, run(plain_grpo_loss, widened(inputs), ["logits"]))


@pytest.mark.parametrize("mask", ["none", "int64"])
def test_log_probs(mask):
    made = logits_and_more((2, 4, 33), torch.float32, 0, mask)
    ids = torch.cat([torch.zeros(2, 3, dtype=torch.int64), made["completion_ids"]], 1)
    mask = made["completion_mask"]
    mask = None if mask is None else torch.cat([torch.ones_like(ids[:, :3]), mask], 1)
    found, native = (
        f(made["logits"], ids, 0.7, mask) for f in (ours.fused_selective_log_softmax, fused_selective_log_softmax)
    )
    compare([found], [native], [native])


def test_in_place_gradients_are_written_over_the_logits():
    """Where they are no leaf's; the gradient is the same."""
    inputs = logits_and_more((2, 4, 33), torch.float32, 0, "int64")
    for function in (ours.triton_grpo_loss, triton_grpo_loss):
        leaf = inputs["logits"].clone().requires_grad_()
        logits = leaf * 1
        function(**inputs | {"logits": logits})[0].sum().backward()
        assert torch.equal(logits, leaf.grad)
    leaf = inputs["logits"].clone().requires_grad_()
    ours.triton_grpo_loss(**inputs | {"logits": leaf})[0].sum().backward()
    assert torch.equal(leaf, inputs["logits"])
