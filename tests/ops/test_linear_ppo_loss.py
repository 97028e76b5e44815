"""`linear_ppo_loss` against the composition of the references in fp64: chunks, frozen parts, masks, registration."""

from __future__ import annotations

import pytest
import torch

from fastppo.native import token_logprobs as native
from fastppo.native.ppo_loss import PPOOptions
from fastppo.ops import _head, linear_ppo_loss, ppo_loss, token_logprobs
from fastppo.ops.ppo_loss import named_statistics
from fastppo.reference.linear_ppo_loss import linear_ppo_loss as reference
from tests.cases import DTYPES
from tests.tolerance import assert_as_exact_as_native, assert_rounds_to

GRADIENTS = ("hidden", "weight", "bias")

VARIANTS = {
    "defaults": {},
    "everything": {"entropy_coef": 0.05, "kl_coef": 0.1, "dual_clip": 1.5, "temperature": 0.7, "softcap": 5.0}
    | {"logit_scale": 0.8, "rollout_correction": "mask", "rollout_bounds": (0.8, 1.2)},
    "entropy": {"entropy_coef": 0.05, "clip_high": 0.28, "aggregation": "seq-mean-token-sum"},
    "sequence": {"ratio_level": "sequence", "clip_low": 0.01, "clip_high": 0.02, "aggregation": "seq-mean-token-mean"},
    "cispo": {"objective": "cispo", "aggregation": "fixed-denominator", "denominator": 20.0, "temperature": 1.3},
}


def make_batch(*shape: int, width=9, vocabulary=67, dtype=torch.float32, share=0.7) -> dict[str, torch.Tensor]:
    """A head whose log-probs are near the old ones; masked rows hold NaN everywhere and labels that do not exist."""
    hidden, weight = torch.randn(*shape, width).to(dtype), (0.3 * torch.randn(vocabulary, width)).to(dtype)
    bias, labels = (0.1 * torch.randn(vocabulary)).to(dtype), torch.randint(0, vocabulary, shape)
    logits = hidden.float() @ weight.float().T + bias.float()
    logprobs = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    mask = torch.rand(shape) < share
    columns = {
        "old_logprobs": logprobs + 0.2 * torch.randn(shape),
        "advantages": torch.randn(shape),
        "ref_logprobs": logprobs + 0.3 * torch.randn(shape),
        "rollout_logprobs": logprobs + 0.3 * torch.randn(shape),
    }
    batch = {name: torch.where(mask, x, torch.nan) for name, x in columns.items()}
    batch |= {"hidden": torch.where(mask.unsqueeze(-1), hidden, torch.nan), "labels": torch.where(mask, labels, -7)}
    return batch | {"weight": weight, "bias": bias, "mask": mask}


def run(function, batch: dict, trained=GRADIENTS, **options):
    """(loss, statistics, log-probs, entropies, gradients of what is `trained`)."""
    leaves = {name: batch[name].detach().clone().requires_grad_() for name in trained if name in batch}
    loss, stats, logprobs, entropy = function(**(batch | leaves), **options)
    if leaves:
        loss.backward()
    stats = named_statistics(stats) if isinstance(stats, dict) else stats
    return loss.detach(), stats, logprobs, entropy, {name: leaf.grad for name, leaf in leaves.items()}


def widened(batch: dict) -> dict:
    return {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}


def compare_results(ours: tuple, native_result: tuple, exact: tuple) -> None:
    results = (ours, native_result, exact)
    assert ours[0].dtype == ours[2].dtype == ours[3].dtype == torch.float32
    for place, name in ((2, "logprobs"), (3, "entropy")):
        assert_as_exact_as_native(*(result[place] for result in results), name)
    together = [torch.stack([result[0], *result[1]._replace(tokens=result[0])]) for result in results]
    assert_as_exact_as_native(*together, "loss and statistics")
    assert ours[1].tokens == exact[1].tokens
    for name in exact[4]:
        assert_as_exact_as_native(*(result[4][name] for result in results), f"gradient of {name}")


def compare(batch: dict, trained=GRADIENTS, **options) -> None:
    ours = run(linear_ppo_loss, batch, trained, **options)
    assert all(gradient.dtype == batch[name].dtype for name, gradient in ours[4].items())
    compare_results(ours, run(reference, batch, trained, **options), run(reference, widened(batch), trained, **options))


def set_rows(monkeypatch, rows: int, vocabulary: int, columns: int = 2048, chunk_rows: int = 0) -> None:
    """So many rows of logits at a time, in blocks of so many columns where the weight is converted."""
    pitch = -(-vocabulary // _head.ALIGNMENT) * _head.ALIGNMENT
    for backend, sizes in _head.SIZES.items():
        gradient_bytes = 2 * chunk_rows * pitch
        smaller = sizes._replace(
            tile_columns=columns, logits_bytes=4 * rows * vocabulary, gradient_bytes=gradient_bytes
        )
        monkeypatch.setitem(_head.SIZES, backend, smaller)
    monkeypatch.setattr(_head, "LARGE_VOCABULARY_ROWS", 1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_variants(backend, variant, dtype):
    """fp32 products and logits for every storage type: as exact as the reference, which computes in fp32."""
    compare(make_batch(5, 21, dtype=dtype), **VARIANTS[variant])


@pytest.mark.parametrize("rows", [1, 2, 7, 70, 71])
@pytest.mark.parametrize("variant", ["everything", "sequence"])
def test_chunk_boundaries(fast_backend, monkeypatch, rows, variant):
    """One row a chunk, a ragged last chunk, exactly one chunk; and a half-precision weight in blocks.

    On a GPU half-precision gradients of logits wait for those of more rows: chunks of two parts, of one, or all in one.
    """
    batch = make_batch(1, 70, share=1.0)
    set_rows(monkeypatch, rows, 67, columns=30, chunk_rows=2 * rows + 1)
    compare(batch, **VARIANTS[variant])
    half = {name: x.bfloat16() if name in GRADIENTS else x for name, x in batch.items()}
    compare(half, **VARIANTS[variant])
    compare(half | {"hidden": batch["hidden"]}, **VARIANTS[variant])


def test_logits_stay_small(cpu_backend, monkeypatch):
    """No more than `logits_bytes` of logits, or an eighth of the weight, exist at a time."""
    monkeypatch.setitem(_head.SIZES, "cpu", _head.SIZES["cpu"]._replace(logits_bytes=2**17))
    seen, add_tile = [], native.token_logprobs_add_tile
    monkeypatch.setattr(native, "token_logprobs_add_tile", lambda x, *rest: seen.append(x.shape) or add_tile(x, *rest))
    for width, rows in ((4, 2**17 // 8000), (1024, 128)):
        seen.clear()
        run(linear_ppo_loss, make_batch(250, width=width, vocabulary=2000, share=1.0), ("hidden",))
        assert sum(count for count, _ in seen) == 250 and max(count for count, _ in seen) == rows
        assert rows * 2000 * 4 <= max(2**17, 2000 * width * 4 / 8)


@pytest.mark.parametrize("trained", [(), ("hidden",), ("weight",), ("bias",), ("hidden", "weight")], ids=str)
def test_frozen_parts(fast_backend, trained):
    """What is frozen gets no gradient and changes nothing else; without any, the loss alone is computed."""
    batch = make_batch(40)
    whole, part = run(linear_ppo_loss, batch), run(linear_ppo_loss, batch, trained)
    assert torch.equal(whole[0], part[0]) and torch.equal(whole[2], part[2]) and torch.equal(whole[3], part[3])
    assert all(torch.equal(part[4][name], whole[4][name]) for name in trained)


def test_without_bias_and_of_any_shape(backend):
    for shape in ((), (30,), (2, 3, 5)):
        batch = make_batch(*shape, share=1.0)
        del batch["bias"]
        compare(batch, kl_coef=0.1)


def test_tied_weight(backend):
    """The head's weight is the embedding too: both gradients add up in one tensor."""

    def gradient(function, weight, batch):
        weight = weight.clone().requires_grad_()
        hidden = torch.tanh(weight[batch["labels"]])
        loss = function(hidden, weight, **{name: x for name, x in batch.items()})[0]
        (loss * 2 + hidden.square().mean()).backward()
        return weight.grad

    batch = make_batch(33, share=1.0)
    weight = batch["weight"]
    batch = {name: batch[name] for name in ("labels", "old_logprobs", "advantages")}
    wide = widened(batch)
    assert_as_exact_as_native(
        gradient(linear_ppo_loss, weight, batch),
        gradient(reference, weight, batch),
        gradient(reference, weight.double(), wide),
    )


def test_agrees_with_the_other_ops(cpu_backend):
    """token_logprobs of the logits, then ppo_loss: the same log-probs, entropies, loss and statistics."""
    batch = make_batch(60, share=1.0)
    ours = linear_ppo_loss(**batch, entropy_coef=0.1, kl_coef=0.1)
    logits = batch["hidden"] @ batch["weight"].T + batch["bias"]
    logprobs, entropy = token_logprobs(logits, batch["labels"], return_entropy=True)
    columns = {name: x for name, x in batch.items() if name not in (*GRADIENTS, "labels")}
    loss, stats = ppo_loss(logprobs, **columns, entropy=entropy, entropy_coef=0.1, kl_coef=0.1)
    exact = run(reference, widened(batch), (), entropy_coef=0.1, kl_coef=0.1)
    compare_results((*ours[:2], *ours[2:], {}), (loss, stats, logprobs, entropy, {}), exact)


def test_autocast_changes_nothing(backend):
    """bf16 hidden states of an autocast trunk meet an fp32 head: products and logits stay fp32."""
    batch = make_batch(50)
    batch["hidden"] = batch["hidden"].bfloat16()

    def under_autocast(**arguments):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return linear_ppo_loss(**arguments)

    ours, expected = run(under_autocast, batch), run(linear_ppo_loss, batch)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[2], expected[2])
    assert all(torch.equal(ours[4][name], expected[4][name]) for name in GRADIENTS)
    compare(batch)


@pytest.mark.parametrize("variant", VARIANTS)
def test_masked_rows_reach_nothing(backend, variant):
    """NaN hidden states and labels out of range under the mask: outputs and gradients 0 there, and finite elsewhere."""
    batch = make_batch(4, 25)
    loss, stats, logprobs, entropy, gradients = run(linear_ppo_loss, batch, **VARIANTS[variant])
    masked = ~batch["mask"]
    assert (logprobs[masked] == 0).all() and (entropy[masked] == 0).all() and (gradients["hidden"][masked] == 0).all()
    for x in (loss, *stats, *gradients.values()):
        assert x.isfinite().all()


def test_ignored_is_as_good_as_masked(backend):
    masked = make_batch(4, 25)
    ignored = {name: x for name, x in masked.items() if name != "mask"}
    for index in (-100, 7):
        ignored["labels"] = torch.where(masked["mask"], masked["labels"], index)
        mask = masked["mask"] & (ignored["labels"] != index)
        a = run(linear_ppo_loss, ignored, ignore_index=index)
        b = run(linear_ppo_loss, masked | {"mask": mask})
        assert torch.equal(a[0], b[0]) and torch.equal(a[2], b[2])
        assert all(torch.equal(a[4][name], b[4][name]) for name in GRADIENTS)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(3, 8), (0, 5), (2, 0)], ids=str)
def test_empty(backend, variant, shape):
    loss, stats, logprobs, entropy, gradients = run(linear_ppo_loss, make_batch(*shape, share=0.0), **VARIANTS[variant])
    assert loss == 0 and all(x == 0 for x in stats)
    assert logprobs.shape == entropy.shape == shape and (logprobs == 0).all()
    assert all((gradient == 0).all() for gradient in gradients.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_equals_padded(backend, variant):
    padded = make_batch(6, 20)
    lengths = torch.tensor([0, 20, 1, 7, 0, 13])
    inside = torch.arange(20) < lengths.unsqueeze(1)
    padded["mask"] &= inside
    shared = ("weight", "bias")
    packed = {name: x if name in shared else x[inside] for name, x in padded.items()}
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    a = run(linear_ppo_loss, padded, **VARIANTS[variant])
    b = run(linear_ppo_loss, packed, cu_seqlens=cu_seqlens, **VARIANTS[variant])
    exact = run(reference, widened(packed), cu_seqlens=cu_seqlens, **VARIANTS[variant])
    compare_results(b, (*a[:2], a[2][inside], a[3][inside], a[4] | {"hidden": a[4]["hidden"][inside]}), exact)


@pytest.mark.parametrize("variant", ["everything", "sequence"])
def test_microbatches_add_up_to_the_minibatch(backend, variant):
    batch, options = make_batch(6, 20), VARIANTS[variant]
    by_sequence = options.get("aggregation", "").startswith("seq-")
    denominator = batch["mask"].any(1).sum() if by_sequence else batch["mask"].sum()
    whole, exact = (
        run(function, inputs, denominator=denominator, **options)
        for function, inputs in ((linear_ppo_loss, batch), (reference, widened(batch)))
    )
    leaves = {name: batch[name].clone().requires_grad_() for name in GRADIENTS}
    split = batch | leaves
    total = 0.0
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part = {name: x if name in ("weight", "bias") else x[rows] for name, x in split.items()}
        loss = linear_ppo_loss(**part, denominator=denominator, **options).loss
        loss.backward()
        total += loss.detach()
    # A mean of terms of about 1 that cancel, and is rounded as they are.
    assert_as_exact_as_native(1 + total, 1 + whole[0], 1 + exact[0])
    for name, leaf in leaves.items():
        assert_as_exact_as_native(leaf.grad, whole[4][name], exact[4][name], name)


def test_strides(backend):
    """A trainer's views: hidden[:, :-1] against tokens[:, 1:], a transposed weight, int32 labels."""
    hidden, tokens = torch.randn(3, 9, 16, requires_grad=True), torch.randint(0, 50, (3, 9), dtype=torch.int32)
    weight = torch.randn(16, 50, requires_grad=True)
    old, advantages = torch.full((3, 8), -4.0), torch.randn(8, 3).T
    loss = linear_ppo_loss(hidden[:, :-1], weight.T, tokens[:, 1:], old, advantages).loss
    ours = torch.autograd.grad(loss, (hidden, weight))
    views = hidden[:, :-1].contiguous(), weight.T.contiguous(), tokens[:, 1:].contiguous()

    def contiguous(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        inputs = (x.to(dtype) if x.is_floating_point() else x for x in (*views, old, advantages.contiguous()))
        loss = linear_ppo_loss(*inputs).loss
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    for values in zip((loss.detach(), *ours), contiguous(torch.float32), contiguous(torch.float64), strict=True):
        assert_as_exact_as_native(*values[:2], values[2].double())


@pytest.mark.parametrize("variant", ["defaults", "sequence"])
def test_time_major_columns(backend, variant):
    """Every [B, T] tensor transposed in memory: rows stay sequences."""
    batch = make_batch(4, 11)
    views = {name: x if name in GRADIENTS else x.T.contiguous().T for name, x in batch.items()}
    assert not views["mask"].is_contiguous()
    calls = (linear_ppo_loss, views), (linear_ppo_loss, batch), (reference, widened(batch))
    results = (run(function, inputs, **VARIANTS[variant]) for function, inputs in calls)
    compare_results(*results)


def test_first_minibatch_ratio_is_one(fast_backend):
    """With the log-probs that the op itself returned as old ones the ratio is exactly 1, chunk by chunk."""
    batch = make_batch(90)
    first = linear_ppo_loss(**batch)
    again = linear_ppo_loss(**(batch | {"old_logprobs": first.logprobs}))
    assert again.stats.ratio_mean == again.stats.ratio_max == 1 and again.stats.approx_kl == 0


def test_upstream_gradient_and_statistics(backend):
    batch = make_batch(20)
    once = run(linear_ppo_loss, batch)[4]["weight"]
    weight = batch["weight"].clone().requires_grad_()
    out = linear_ppo_loss(**(batch | {"weight": weight}))
    assert not any(x.requires_grad for x in (*out.stats, out.logprobs, out.entropy))
    out.loss.expand(3).sum().backward()
    assert_rounds_to(weight.grad, 3 * once.double())


def test_float64_gradcheck():
    batch = widened(make_batch(4, width=3, vocabulary=5, share=1.0))
    leaves = [batch[name].requires_grad_() for name in GRADIENTS]
    assert torch.autograd.gradcheck(
        lambda *x: (
            linear_ppo_loss(**(batch | dict(zip(GRADIENTS, x, strict=True))), kl_coef=0.1, entropy_coef=0.1).loss
        ),
        leaves,
    )


def test_opcheck(cpu_backend):
    batch = make_batch(2, 9)
    for name in GRADIENTS:
        batch[name].requires_grad_()
    order = ("hidden", "weight", "labels", "old_logprobs", "advantages", "mask", "bias", "ref_logprobs")
    tensors = [batch[name] for name in (*order, "rollout_logprobs")]
    codes = PPOOptions(0.2, 0.2, None, None, 0.0, 0.1, "k3", 0.1, "clip", "mask", (0.5, 2.0)).codes()
    options = (0.9, 4.0, 1.0, -100, *codes, "sequence", "seq-mean-token-mean")
    for wanted in ([True, True, True], [True, False, False]):
        arguments = (*tensors, None, None, *options, wanted, "cpu")
        torch.library.opcheck(torch.ops.fastppo.linear_ppo_loss, arguments)


def test_compiles_without_graph_breaks(cpu_backend):
    batch, options = make_batch(2, 30), VARIANTS["everything"]
    compiled = torch.compile(linear_ppo_loss, fullgraph=True, backend="aot_eager")
    ours, expected = run(compiled, batch, **options), run(linear_ppo_loss, batch, **options)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[2], expected[2])
    assert all(torch.equal(ours[4][name], expected[4][name]) for name in GRADIENTS)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(2, 5)}, ValueError, r"hidden has shape \[2, 5\], expected \[..., 4\]"),
        ({"weight": torch.zeros(4)}, ValueError, r"weight has shape \[4\], expected \[V, H\]"),
        ({"weight": torch.zeros(0, 4)}, ValueError, "V, H >= 1"),
        ({"weight": torch.zeros(9, 4, dtype=torch.long)}, TypeError, "weight has dtype torch.int64"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias has shape \[8\], expected \[9\]"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, ValueError, r"labels has shape \[3\], expected \[2\]"),
        ({"labels": torch.tensor([0, 9])}, ValueError, "labels holds 9 at flat position 1, expected 0 <= label < 9"),
        ({"labels": torch.tensor([0, -1])}, ValueError, "labels holds -1"),
        ({"old_logprobs": torch.zeros(3)}, ValueError, r"old_logprobs has shape \[3\], expected \[2\]"),
        ({"mask": torch.ones(2)}, TypeError, "mask has dtype torch.float32"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
        ({"kl_coef": 0.1}, ValueError, "ref_logprobs is None"),
        ({"rollout_correction": "truncate"}, ValueError, "rollout_logprobs is None"),
        ({"ratio_level": "sequence"}, ValueError, "cu_seqlens is None"),
        ({"ratio_level": "sequence", "cu_seqlens": torch.tensor([0, 3])}, ValueError, "cu_seqlens holds 3"),
        ({"aggregation": "fixed-denominator"}, ValueError, "denominator is None"),
        ({"clip_low": -1.0}, ValueError, "clip_low is -1.0"),
    ],
)
def test_errors_name_the_argument(cpu_backend, change, error, message):
    arguments = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(9, 4), "labels": torch.tensor([1, 2])}
    arguments |= {"old_logprobs": torch.zeros(2), "advantages": torch.zeros(2)} | change
    with pytest.raises(error, match=message):
        linear_ppo_loss(**arguments)
