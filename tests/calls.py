"""One call of every op, with its gradients, on tensors of any device: what tests/test_gpu.py looks at from all sides, tried here on a CPU too."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo import ops
from tests.tolerance import assert_as_exact_as_native, assert_no_worse_than

Inputs = dict[str, Tensor]
Call = Callable[[Inputs], tuple[Tensor, ...]]
TOKENS, VOCABULARY, WIDTH = 96, 1000, 64
KEPT_SHARE = 0.8


def make_inputs(device: str, seed: int = 0) -> Inputs:
    """The same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    columns = ("old_logprobs", "ref_logprobs", "logprobs", "advantages", "values", "old_values", "returns", "rewards")
    inputs = {name: noise(TOKENS) / 4 for name in columns} | {
        "logits": noise(TOKENS, VOCABULARY),
        "hidden": noise(TOKENS, WIDTH),
        "weight": noise(VOCABULARY, WIDTH) / 8,
        "wide": noise(70, VOCABULARY),
        "labels": torch.randint(VOCABULARY, (TOKENS,), generator=generator),
        "mask": torch.rand(TOKENS, generator=generator) < KEPT_SHARE,
        "cu_seqlens": torch.tensor([0, 40, 41, TOKENS], dtype=torch.int32),
        "prompts": torch.tensor([-1, 0, 0], dtype=torch.int32),
        "q": noise(4, 6, 32),
        "pages": noise(2, 9, 64, 2, 32),
        "block_table": torch.randperm(8, generator=generator).view(4, 2).int(),
        "context_lens": torch.tensor([1, 64, 100, 128], dtype=torch.int32),
        "slots": torch.randperm(9 * 64, generator=generator)[:TOKENS],
        "tables": noise(2, 50, 24),
        "keys": noise(TOKENS, 2, 2, 16),
        "positions": torch.randint(50, (TOKENS,), generator=generator),
    }
    return {name: x.to(device) for name, x in inputs.items()}


def leaves(x: Inputs, *names: str) -> list[Tensor]:
    return [x[name].detach().requires_grad_() for name in names]


def with_gradients(outputs: tuple[Tensor, ...], upstream: Tensor, wanted: list[Tensor]) -> tuple[Tensor, ...]:
    """The outputs, detached, and the gradients of their sums weighted with `upstream`."""
    loss = sum((output * upstream).sum() for output in outputs)
    return *(output.detach() for output in outputs), *torch.autograd.grad(loss, wanted)


def token_logprobs(x: Inputs) -> tuple[Tensor, ...]:
    (logits,) = leaves(x, "logits")
    outputs = ops.token_logprobs(logits, x["labels"], return_entropy=True)
    return with_gradients(tuple(outputs), x["advantages"], [logits])


def token_logprobs_in_place(x: Inputs) -> tuple[Tensor, ...]:
    (leaf,) = leaves(x, "logits")
    return with_gradients((ops.token_logprobs(leaf * 1, x["labels"], inplace_backward=True),), x["advantages"], [leaf])


def linear_token_logprobs(x: Inputs) -> tuple[Tensor, ...]:
    wanted = leaves(x, "hidden", "weight")
    return with_gradients((ops.linear_token_logprobs(*wanted, x["labels"]),), x["advantages"], wanted)


def linear_ppo_loss(x: Inputs) -> tuple[Tensor, ...]:
    wanted = leaves(x, "hidden", "weight")
    columns = (x["labels"], x["old_logprobs"], x["advantages"], x["mask"])
    result = ops.linear_ppo_loss(*wanted, *columns, entropy_coef=0.01, kl_coef=0.1, ref_logprobs=x["ref_logprobs"])
    statistics = torch.stack([statistic.detach() for statistic in result.stats])
    return *with_gradients((result.loss,), x["advantages"][0], wanted), statistics


def ppo_loss(x: Inputs) -> tuple[Tensor, ...]:
    (logprobs,) = leaves(x, "logprobs")
    loss = ops.ppo_loss(logprobs, x["old_logprobs"], x["advantages"], x["mask"]).loss
    return with_gradients((loss,), x["advantages"][0], [logprobs])


def ppo_loss_of_sequences(x: Inputs) -> tuple[Tensor, ...]:
    wanted = leaves(x, "logprobs", "values")
    others = {name: x[name] for name in ("old_values", "returns", "ref_logprobs", "cu_seqlens")}
    options = {"ratio_level": "sequence", "aggregation": "seq-mean-token-mean", "value_clip": 0.2, "kl_coef": 0.1}
    columns = (wanted[0], x["old_logprobs"], x["advantages"], x["mask"])
    result = ops.ppo_loss(*columns, values=wanted[1], **others, **options)
    statistics = torch.stack([statistic.detach() for statistic in result.stats])
    return *with_gradients((result.loss,), x["advantages"][0], wanted), statistics


def gae_of_packed_sequences(x: Inputs) -> tuple[Tensor, ...]:
    sequences = {"mask": x["mask"], "cu_seqlens": x["cu_seqlens"]}
    return tuple(ops.gae(x["rewards"], x["values"], **sequences, gamma=0.99, lam=0.95))


def masked_mean(x: Inputs) -> tuple[Tensor, ...]:
    (values,) = leaves(x, "values")
    return with_gradients((ops.masked_mean(values, x["mask"]),), x["advantages"][0], [values])


def approx_kl(x: Inputs) -> tuple[Tensor, ...]:
    (logprobs,) = leaves(x, "logprobs")
    return with_gradients((ops.approx_kl(logprobs, x["ref_logprobs"], "k3"),), x["advantages"], [logprobs])


def kl_shaped_rewards(x: Inputs) -> tuple[Tensor, ...]:
    columns = (x["rewards"][:3], x["logprobs"], x["ref_logprobs"], x["mask"])
    return (ops.kl_shaped_rewards(*columns, coef=0.1, cu_seqlens=x["cu_seqlens"]),)


def sample_tokens(x: Inputs) -> tuple[Tensor, ...]:
    numbers = {"seed": 3, "sequence_ids": x["labels"], "positions": x["labels"]}
    return tuple(ops.sample_tokens(x["logits"], temperature=0.7, top_k=50, top_p=0.9, min_p=0.01, **numbers))


def packed_attention(x: Inputs, **options: int) -> tuple[Tensor, ...]:
    """Four query heads of two key heads."""
    wanted = leaves(x, "hidden", "keys")
    q, k, v = wanted[0].view(TOKENS, 4, 16), *wanted[1].unbind(1)
    out = ops.packed_attention(q, k, v, x["cu_seqlens"], prompts=x["prompts"], **options)
    return with_gradients((out,), x["advantages"][:, None, None], wanted)


def write_kv(x: Inputs) -> tuple[Tensor, ...]:
    k_pages, v_pages = x["pages"].clone()
    k, v = x["hidden"].view(TOKENS, 2, 32), x["weight"][:TOKENS].view(TOKENS, 2, 32)
    ops.write_kv(k, v, k_pages, v_pages, x["slots"])
    return k_pages, v_pages


def rms_norm(x: Inputs) -> tuple[Tensor, ...]:
    hidden, weight = leaves(x, "hidden", "weight")
    outputs = ops.rms_norm(hidden, weight[0], eps=1e-5)
    return with_gradients((outputs,), x["advantages"][:, None], [hidden, weight])


def rms_norm_of_a_sum(x: Inputs) -> tuple[Tensor, ...]:
    wanted = leaves(x, "hidden", "weight")
    outputs = ops.rms_norm(wanted[0], x["tables"].flatten()[:WIDTH], eps=1e-5, residual=wanted[1][:TOKENS])
    return with_gradients(tuple(outputs), x["advantages"][:, None], wanted)


def rotary_embedding(x: Inputs) -> tuple[Tensor, ...]:
    (hidden,) = leaves(x, "hidden")
    turned = ops.rotary_embedding(hidden.view(TOKENS, 2, 32), *x["tables"], x["positions"])
    return with_gradients((turned,), x["advantages"][:, None, None], [hidden])


def swiglu(x: Inputs) -> tuple[Tensor, ...]:
    wanted = leaves(x, "hidden", "weight")
    return with_gradients((ops.swiglu(wanted[0], wanted[1][:TOKENS]),), x["advantages"][:, None], wanted)


# By op, and what else its kernels serve.
CALLS: dict[str, Call] = {
    "token_logprobs": token_logprobs,
    "token_logprobs: in place": token_logprobs_in_place,
    "linear_token_logprobs": linear_token_logprobs,
    "linear_ppo_loss": linear_ppo_loss,
    "gae": lambda x: tuple(ops.gae(x["rewards"].view(8, 12), x["values"].view(8, 12), gamma=0.99, lam=0.95)),
    "gae: packed": gae_of_packed_sequences,
    "masked_whiten": lambda x: (ops.masked_whiten(x["advantages"], x["mask"]),),
    "masked_whiten: masked_mean": masked_mean,
    "approx_kl": approx_kl,
    "approx_kl: kl_shaped_rewards": kl_shaped_rewards,
    "ppo_loss": ppo_loss,
    "ppo_loss: sequences": ppo_loss_of_sequences,
    "sample_tokens": sample_tokens,
    "decode_attention": lambda x: (
        ops.decode_attention(x["q"], *x["pages"], x["block_table"], x["context_lens"], softcap=5.0),
    ),
    "decode_attention: write_kv": write_kv,
    "packed_attention": packed_attention,
    "packed_attention: window": lambda x: packed_attention(x, window=20),
    "batch_invariant_linear": lambda x: (ops.batch_invariant_linear(x["hidden"], x["weight"]),),
    "batch_invariant_linear: splits": lambda x: (ops.batch_invariant_linear(x["logits"], x["wide"]),),
    "rms_norm": rms_norm,
    "rms_norm: of a sum": rms_norm_of_a_sum,
    "rotary_embedding": rotary_embedding,
    "swiglu": swiglu,
}


class Large(NamedTuple):
    """`check(elements, device)` asserts that an op whose largest tensor has more than so many elements gives in its last places what it
    gives for these alone."""

    check: Callable[[int, str], None]
    bytes: int
    """Memory that it takes for each of the elements."""


def two_last_rows(elements: int, device: str, width: int = 4099) -> Tensor:
    """bf16 [elements / width and more, width], 0 but for the last two rows."""
    x = torch.zeros(elements // width + 3, width, dtype=torch.bfloat16, device=device)
    x[-2:].normal_()
    return x


def large_logits(elements: int, device: str) -> None:
    logits = two_last_rows(elements, device)
    labels = torch.full(logits.shape[:1], logits.shape[1] - 1, device=device)
    results = []
    for part in (logits, logits[-2:].clone()):
        leaf = part.requires_grad_()
        logprobs, entropy = ops.token_logprobs(leaf, labels[: len(part)], return_entropy=True)
        (gradient,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), leaf)
        results.append((logprobs[-2:].detach(), entropy[-2:].detach(), gradient[-2:]))
    assert_equal(*results)


def large_head(elements: int, device: str) -> None:
    """Its logits are never whole: tokens times vocabulary exceed what an int32 holds."""
    rows, vocabulary = elements // 4099 + 3, 4099
    hidden, weight = torch.zeros(rows, 16, device=device), torch.randn(vocabulary, 16, device=device)
    hidden[-2:].normal_()
    labels = torch.full((rows,), vocabulary - 1, device=device)
    found = ops.linear_token_logprobs(hidden, weight, labels)[-2:]
    native = ops.linear_token_logprobs(hidden[-2:], weight, labels[-2:])  # another product, other roundings
    exact = ops.linear_token_logprobs(hidden[-2:].double(), weight.double(), labels[-2:])
    assert_as_exact_as_native(found, native, exact)


def large_sampling(elements: int, device: str) -> None:
    logits = two_last_rows(elements, device)
    numbers = torch.arange(len(logits), device=device)
    whole = ops.sample_tokens(logits, top_p=0.9, seed=1, sequence_ids=numbers)
    last = ops.sample_tokens(logits[-2:], top_p=0.9, seed=1, sequence_ids=numbers[-2:])
    assert_equal([x[-2:] for x in whole], last)


def large_gae(elements: int, device: str) -> None:
    values = two_last_rows(elements, device)
    whole, last = (ops.gae(x, x, gamma=0.99, lam=0.95) for x in (values, values[-2:]))
    assert_equal([x[-2:] for x in whole], last)


def large_loss(elements: int, device: str) -> None:
    logprobs = two_last_rows(elements, device).view(-1)
    results = []
    for part in (logprobs, logprobs[-99:].clone()):
        leaf, zeros = part.requires_grad_(), torch.zeros_like(part)
        loss = ops.ppo_loss(leaf, zeros, part.detach(), aggregation="fixed-denominator", denominator=8.0).loss
        results.append([torch.autograd.grad(loss, leaf)[0][-99:]])
    assert_equal(*results)


def large_kl(elements: int, device: str) -> None:
    x = two_last_rows(elements, device).view(-1)
    assert_equal([ops.approx_kl(x, x.neg(), "k3")[-99:]], [ops.approx_kl(x[-99:], x[-99:].neg(), "k3")])


def large_whitening(elements: int, device: str) -> None:
    x = two_last_rows(elements, device).view(-1)
    mask = torch.zeros(len(x), dtype=torch.bool, device=device)
    mask[-99:] = True
    few, few_mask = x[-99:], mask[-99:]
    native, exact = (ops.masked_whiten(part, few_mask) for part in (few, few.double()))
    assert_as_exact_as_native(ops.masked_whiten(x, mask)[-99:], native, exact)


def large_cache(elements: int, device: str) -> None:
    pages = [two_last_rows(elements, device, 64 * 2 * 32).view(-1, 64, 2, 32) for _ in range(2)]
    few, last = [x[-2:].clone() for x in pages], len(pages[0]) - 2
    key = torch.randn(1, 2, 32, device=device).bfloat16()
    query = torch.randn(1, 4, 32, device=device).bfloat16()
    lens = torch.tensor([120], dtype=torch.int32, device=device)
    results = []
    for cache, first in ((pages, last), (few, 0)):
        ops.write_kv(key, key, *cache, torch.tensor([(first + 1) * 64 + 50], device=device))
        table = torch.tensor([[first, first + 1]], dtype=torch.int32, device=device)
        results.append([ops.decode_attention(query, *cache, table, lens), cache[0][-1]])
    assert_equal(*results)


def large_attention(elements: int, device: str) -> None:
    """The last sequence follows a prompt of one token; the others are short, so that there are few pairs."""
    x = two_last_rows(elements, device, 4096).view(-1, 16, 256)
    bounds = torch.tensor([*range(0, len(x) - 3, 64), len(x) - 3, len(x) - 2, len(x)], device=device)
    prompts = torch.full((len(bounds) - 1,), -1, device=device)
    prompts[-1] = len(prompts) - 2
    results = []
    for part, offsets, follows in (
        (x, bounds, prompts),
        (x[-3:].clone(), bounds[-3:] - bounds[-3], prompts[-2:].clamp(max=0)),
    ):
        leaf = part.requires_grad_()
        out = ops.packed_attention(leaf, leaf, leaf, offsets, prompts=follows)
        results.append([out[-3:].detach(), torch.autograd.grad(out, leaf, part.detach())[0][-3:]])
    assert_equal(*results)


def large_weight(elements: int, device: str) -> None:
    weight, x = two_last_rows(elements, device, 256), torch.randn(3, 256, device=device).bfloat16()
    assert_equal([ops.batch_invariant_linear(x, weight)[:, -2:]], [ops.batch_invariant_linear(x, weight[-2:])])


def large_norm(elements: int, device: str) -> None:
    x = two_last_rows(elements, device)
    results = []
    for part in (x, x[-2:].clone()):
        leaf = part.requires_grad_()
        normed = ops.rms_norm(leaf, x.detach()[-1], eps=1e-5)
        results.append([normed[-2:].detach(), torch.autograd.grad(normed, leaf, part.detach())[0][-2:]])
    assert_equal(*results)


def large_heads(elements: int, device: str) -> None:
    x, tables = two_last_rows(elements, device, 4096).view(-1, 32, 128), torch.randn(2, 3, 128, device=device)
    positions = torch.arange(len(x), device=device) % 3
    results = []
    for part, places in ((x, positions), (x[-2:].clone(), positions[-2:])):
        leaf = part.requires_grad_()
        turned = ops.rotary_embedding(leaf, *tables, places)
        results.append([turned[-2:].detach(), torch.autograd.grad(turned, leaf, part.detach())[0][-2:]])
    assert_equal(*results)


def large_gate(elements: int, device: str) -> None:
    x = two_last_rows(elements, device).view(-1)
    results = []
    for part in (x, x[-99:].clone()):
        leaf = part.requires_grad_()
        gated = ops.swiglu(leaf, leaf)
        results.append([gated[-99:].detach(), torch.autograd.grad(gated, leaf, part.detach())[0][-99:]])
    assert_equal(*results)


LARGE = {
    "token_logprobs": Large(large_logits, 8),
    "linear_token_logprobs": Large(large_head, 1),
    "sample_tokens": Large(large_sampling, 6),
    "gae": Large(large_gae, 14),
    "ppo_loss": Large(large_loss, 20),
    "approx_kl": Large(large_kl, 10),
    "masked_whiten": Large(large_whitening, 12),
    "decode_attention": Large(large_cache, 5),
    "packed_attention": Large(large_attention, 18),
    "batch_invariant_linear": Large(large_weight, 3),
    "rms_norm": Large(large_norm, 7),
    "rotary_embedding": Large(large_heads, 7),
    "swiglu": Large(large_gate, 13),
}


def assert_equal(found: tuple[Tensor, ...] | list[Tensor], expected: tuple[Tensor, ...] | list[Tensor]) -> None:
    """To the last bit."""
    assert len(found) == len(expected)
    for place, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(ours, theirs), f"output {place}"


def assert_as_exact(call: str, found: tuple[Tensor, ...], native: tuple[Tensor, ...]) -> None:
    """What a call gave for `make_inputs`, on any device, by the one error rule; integers are equal."""
    exact = CALLS[call]({name: x.double() if x.is_floating_point() else x for name, x in make_inputs("cpu").items()})
    for place, (ours, theirs, truth) in enumerate(zip(found, native, exact, strict=True)):
        if theirs.is_floating_point():
            # The gradients of attention are sums that cancel in other places than native's.
            rule = assert_no_worse_than if call == "packed_attention" and place else assert_as_exact_as_native
            rule(ours.cpu(), theirs.cpu(), truth.double(), f"output {place} of {call}")
        else:
            assert torch.equal(ours.cpu(), theirs.cpu()), f"output {place} of {call}"


def bad_inputs(device: str) -> None:
    """Labels, pages, slots and offsets out of range give NaN, or nothing, where they stand, on a device for which the host does not wait."""
    x = make_inputs(device)
    labels = x["labels"].clone()
    labels[3], labels[5] = 10**12, -5
    for logprobs in (
        ops.token_logprobs(x["logits"], labels),
        ops.linear_token_logprobs(x["hidden"], x["weight"], labels),
    ):
        assert logprobs.isnan().nonzero().flatten().tolist() == [3, 5]
    positions = x["positions"].clone()
    positions[3], positions[5] = 10**12, -1
    turned = ops.rotary_embedding(x["hidden"].view(TOKENS, 2, 32), *x["tables"], positions)
    assert turned[..., :24].isnan().all(-1).all(-1).nonzero().flatten().tolist() == [3, 5]
    assert int(turned.isnan().sum()) == 2 * 2 * 24
    table = x["block_table"].clone()
    table[2, 0] = 1 << 30
    out = ops.decode_attention(x["q"], *x["pages"], table, x["context_lens"])
    assert out[2].isnan().all() and out[[0, 1, 3]].isfinite().all()
    heads = x["hidden"].view(TOKENS, 4, 16)
    for offsets, prompts, bad in (
        ([0, 40, 41, TOKENS], [-1, 2, 0], [40]),
        ([0, 10**6, 41, TOKENS], [-1, 0, 0], [*range(TOKENS)]),
    ):
        tables = (torch.tensor(table, dtype=torch.int32, device=device) for table in (offsets, prompts))
        offsets, prompts = tables
        out = ops.packed_attention(heads, heads, heads, offsets, prompts=prompts)
        assert out.isnan().flatten(1).all(1).nonzero().flatten().tolist() == bad and int(out.isnan().sum()) == 64 * len(
            bad
        )
    pages, ones = x["pages"].clone(), torch.ones(4, 2, 32, device=device)
    ops.write_kv(ones, ones, *pages, torch.tensor([10**12, 5, -1, 9 * 64], device=device))
    assert int((pages != x["pages"]).any(-1).any(-1).sum()) == 2
    offsets = torch.tensor([0, 10**6, TOKENS], dtype=torch.int32, device=device)
    assert ops.gae(x["rewards"], x["values"], gamma=0.9, lam=0.9, cu_seqlens=offsets).advantages.isnan().all()
