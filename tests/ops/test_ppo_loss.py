"""`ppo_loss` against its fp64 reference: every variant, ties, masks, micro-batches, layouts, registration."""

from __future__ import annotations

import pytest
import torch

from fastppo.native.ppo_loss import PPOOptions
from fastppo.ops import ppo_loss
from fastppo.ops.ppo_loss import PPOStats, named_statistics
from fastppo.reference.ppo_loss import ppo_loss as reference
from tests.cases import DTYPES
from tests.isa import assert_same_bits_on_every_isa
from tests.tolerance import assert_as_exact_as_native, assert_rounds_to

GRADIENTS = ("logprobs", "values", "entropy")
EVERYTHING = {"dual_clip": 1.5, "value_clip": 0.2, "kl_coef": 0.1, "entropy_coef": 0.01}

# Each value of each option, and the pairs that meet in the kernel.
VARIANTS = {
    "defaults": {},
    "everything": EVERYTHING,
    "clip-higher": {"clip_low": 0.1, "clip_high": 0.28, "vf_coef": 0.0, "kl_coef": 1.0, "kl_kind": "k1"},
    "no-lower-clip": {"clip_low": 1.0, "clip_high": 0.0, "kl_coef": 0.3, "kl_kind": "k2"},
    "dual": {"dual_clip": 1.1, "clip_high": 0.5, "kl_coef": 0.3, "kl_kind": "abs"},
    "value-clip": {"value_clip": 0.5, "vf_coef": 1.0, "kl_coef": 0.3, "kl_kind": "k1+"},
    "gspo": {"ratio_level": "sequence", "clip_low": 0.01, "clip_high": 0.02, "aggregation": "seq-mean-token-mean"},
    "gspo-dual-truncate": EVERYTHING
    | {"ratio_level": "sequence", "clip_low": 0.01, "clip_high": 0.01, "dual_clip": 1.001, "kl_kind": "k3+"}
    | {"rollout_correction": "truncate", "rollout_bounds": (0.0, 1.1)},
    "cispo": {"objective": "cispo", "clip_low": 1.0, "clip_high": 0.1, "aggregation": "fixed-denominator"},
    "cispo-sequence-mask": {"objective": "cispo", "ratio_level": "sequence", "clip_low": 0.02, "clip_high": 0.02}
    | {"rollout_correction": "mask", "rollout_bounds": (0.8, 1.2), "aggregation": "seq-mean-token-sum"},
    "truncate": {"rollout_correction": "truncate", "rollout_bounds": (0.5, 1.05)},
    "mask": EVERYTHING | {"rollout_correction": "mask", "rollout_bounds": (0.9, 1.1)},
    "token-sum": {"aggregation": "seq-mean-token-sum", "entropy_coef": 0.1},
    "token-mean": EVERYTHING | {"aggregation": "seq-mean-token-mean"},
    "denominator": EVERYTHING | {"denominator": 77.5, "aggregation": "seq-mean-token-sum"},
}


def make_batch(*shape: int, dtype=torch.float32, share: float = 0.7) -> dict[str, torch.Tensor]:
    """Tensors in the ranges that training sees; a mask with holes, and NaN and infinities under it."""
    logprobs = -3 * torch.rand(shape)
    batch = {
        "logprobs": logprobs,
        "old_logprobs": logprobs + 0.2 * torch.randn(shape),
        "advantages": torch.randn(shape),
        "values": torch.randn(shape),
        "returns": torch.randn(shape),
        "ref_logprobs": logprobs + 0.4 * torch.randn(shape),
        "entropy": 2 * torch.rand(shape),
        "rollout_logprobs": logprobs + 0.3 * torch.randn(shape),
    }
    batch["old_values"] = batch["values"] + 0.4 * torch.randn(shape)
    mask = torch.rand(shape) < share
    for name, poison in zip(batch, [torch.nan, torch.inf, -torch.inf] * 3, strict=True):
        batch[name] = torch.where(mask, batch[name], poison).to(dtype)
    return batch | {"mask": mask}


def complete(options: dict) -> dict:
    needs_denominator = options.get("aggregation") == "fixed-denominator" and "denominator" not in options
    return options | ({"denominator": 100.0} if needs_denominator else {})


def run(function, batch: dict, upstream: float = 1.0, **options):
    """(loss, statistics, gradients of logprobs, values and entropy; None where there is none)."""
    leaves = {name: batch[name].detach().clone().requires_grad_() for name in GRADIENTS if name in batch}
    loss, stats = function(**(batch | leaves), **complete(options))
    (loss * upstream).backward()
    stats = named_statistics(stats) if isinstance(stats, dict) else stats
    return loss.detach(), stats, {name: leaf.grad for name, leaf in leaves.items()}


def widened(batch: dict) -> dict:
    return {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in batch.items()}


def compare_scalars(*results: tuple) -> None:
    """Sums of terms of both signs may cancel to any small number: they are judged together, on their mean's scale."""
    cancelling = ("policy_loss", "kl_loss", "ppo_kl")
    together = [torch.stack([loss, *(getattr(stats, name) for name in cancelling)]) for loss, stats in results]
    assert_as_exact_as_native(*together, "loss, " + ", ".join(cancelling))
    for name in results[0][1]._fields:
        if name not in cancelling:
            assert_as_exact_as_native(*(getattr(stats, name) for _, stats in results), name)


def compare(batch: dict, **options) -> None:
    ours, native, exact = (
        run(function, inputs, **options)
        for function, inputs in ((ppo_loss, batch), (reference, batch), (reference, widened(batch)))
    )
    assert ours[0].dtype == torch.float32
    compare_scalars(*((loss, stats) for loss, stats, _ in (ours, native, exact)))
    for name, gradient in exact[2].items():
        if gradient is None:
            assert ours[2][name] is None
        else:
            assert ours[2][name].dtype == batch[name].dtype
            assert_as_exact_as_native(ours[2][name], native[2][name], gradient, f"gradient of {name}")


def without(batch: dict, *names: str) -> dict:
    return {name: x for name, x in batch.items() if name not in names}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_variants(backend, variant, dtype):
    compare(make_batch(5, 333, dtype=dtype), **VARIANTS[variant])


@pytest.mark.parametrize("variant", ["everything", "gspo-dual-truncate", "cispo-sequence-mask"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 512), (1, 1025), (40, 1), (0, 5), (3, 0)], ids=str)
def test_shapes(backend, variant, shape):
    compare(make_batch(*shape, share=0.9), **VARIANTS[variant])


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 19)], ids=str)
def test_any_shape_where_no_sequence_matters(backend, shape):
    compare(make_batch(*shape), **EVERYTHING)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs", "k1+", "k3+"])
def test_kl_kinds_over_their_whole_range(backend, kind):
    """From ratios of 1 + 1e-6, where k3 is about 1e-13, to the clamps of the log-ratio (20) and of k3 (10)."""
    batch = make_batch(4, 200)
    x = torch.linspace(-7, 1.6, 400).exp()  # up to e^1.6, then far beyond
    batch["logprobs"] = torch.cat([x, -0.3 * x]).view(4, 200).clone()
    batch["ref_logprobs"] = torch.zeros(4, 200)
    batch["ref_logprobs"][1, 150:], batch["ref_logprobs"][3, 190:] = -30.0, 30.0
    batch["mask"] = torch.ones(4, 200, dtype=torch.bool)
    batch["advantages"] = torch.zeros(4, 200)
    for rows in (slice(0, 1), slice(0, 4)):
        part = {name: value[rows] for name, value in batch.items() if name in ("advantages", "mask")}
        part |= {name: batch[name][rows] for name in ("logprobs", "ref_logprobs")} | {
            "old_logprobs": batch["logprobs"][rows]
        }
        compare(part, kl_coef=1.0, kl_kind=kind)


def test_mixed_dtypes(backend):
    batch = make_batch(3, 100)
    for name, dtype in zip(("logprobs", "advantages", "values", "returns", "entropy"), DTYPES * 2, strict=False):
        batch[name] = batch[name].to(dtype)
    compare(batch, **EVERYTHING)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_stands_under_the_mask_reaches_nothing(backend, variant):
    """The same bits whether masked places hold NaN and infinities or zeros."""
    dirty = make_batch(5, 333)
    clean = {name: x if name == "mask" else torch.where(dirty["mask"], x, 0) for name, x in dirty.items()}
    a, b = run(ppo_loss, dirty, **VARIANTS[variant]), run(ppo_loss, clean, **VARIANTS[variant])
    assert torch.equal(a[0], b[0]) and torch.equal(torch.stack([*a[1]]), torch.stack([*b[1]]))
    assert a[0].isfinite() and torch.stack([*a[1]]).isfinite().all()
    for name in GRADIENTS:
        assert (a[2][name] is None and b[2][name] is None) or torch.equal(a[2][name], b[2][name])
        assert a[2][name] is None or (a[2][name][~dirty["mask"]] == 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_mask_is_zero(backend, variant):
    batch = make_batch(3, 40, share=0.0)
    loss, stats, gradients = run(ppo_loss, batch, **VARIANTS[variant])
    assert loss == 0 and all(x == 0 for x in stats)
    assert all(gradient is None or (gradient == 0).all() for gradient in gradients.values())


@pytest.mark.parametrize("denominator", [0.0, torch.nan])
def test_empty_mask_under_any_denominator(backend, denominator):
    """A count over an empty minibatch is 0: its loss is 0, not 0 / 0."""
    loss, _, gradients = run(ppo_loss, make_batch(2, 9, share=0.0), denominator=torch.tensor(denominator))
    assert loss == 0 and (gradients["logprobs"] == 0).all()


def test_unmasked_nan_shows(backend):
    """A NaN that counts is never hidden by a maximum or a clamp: the trainer must see it."""
    for name in ("logprobs", "old_logprobs", "advantages", "values", "returns", "ref_logprobs", "entropy"):
        batch = make_batch(2, 40, share=1.0)
        batch[name][1, 3] = torch.nan
        loss, _, gradients = run(ppo_loss, batch, **EVERYTHING)
        assert loss.isnan(), name
        if name in ("logprobs", "old_logprobs", "advantages"):
            assert gradients["logprobs"].isnan().sum() == 1, name


def test_first_minibatch_is_exact(backend):
    """With old = ref = the policy's own log-probs: ratio exactly 1, KL exactly 0, nothing clipped."""
    batch = make_batch(4, 100)
    batch["old_logprobs"] = batch["ref_logprobs"] = batch["logprobs"]
    for level in ("token", "sequence"):
        stats = ppo_loss(**batch, ratio_level=level).stats
        assert stats.ratio_mean == stats.ratio_max == 1
        assert stats.approx_kl == stats.ppo_kl == stats.kl_ref == stats.clipfrac == 0


GRADCHECK = ["defaults", "everything", "clip-higher", "no-lower-clip", "dual", "truncate", "mask", "token-mean"]


@pytest.mark.parametrize("variant", GRADCHECK)
def test_reference_gradcheck(variant):
    """float64 runs in the reference: autograd agrees with finite differences (random inputs stand clear of kinks)."""
    batch = widened(make_batch(2, 9, share=1.0))
    leaves = [batch[name].requires_grad_() for name in GRADIENTS]
    assert torch.autograd.gradcheck(
        lambda *x: ppo_loss(**(batch | dict(zip(GRADIENTS, x, strict=True))), **VARIANTS[variant]).loss, leaves
    )


# Splits and layouts


@pytest.mark.parametrize("variant", ["everything", "gspo", "cispo", "token-sum", "token-mean", "mask"])
def test_microbatches_add_up_to_the_minibatch(backend, variant):
    """verl#5625, trl#6024: with the minibatch's denominator the split matters neither to loss nor to gradients."""
    options = complete(VARIANTS[variant])
    batch = make_batch(7, 120)
    batch["mask"][2] = False
    by_sequence = options.get("aggregation", "").startswith("seq-")
    mask = batch["mask"]
    denominator = options.get("denominator", mask.any(1).sum() if by_sequence else mask.sum())
    options = options | {"denominator": denominator}
    whole, exact = run(ppo_loss, batch, **options), run(reference, widened(batch), **options)
    for cuts in ([0, 1, 2, 3, 7], [0, 3, 4, 7]):
        parts = [
            run(ppo_loss, {k: x[a:b] for k, x in batch.items()}, **options)
            for a, b in zip(cuts, cuts[1:], strict=False)
        ]
        for name in GRADIENTS:
            if whole[2][name] is not None:
                assert torch.equal(torch.cat([part[2][name] for part in parts]), whole[2][name]), name
        loss = torch.stack([part[0] for part in parts]).double().sum().float()
        compare_scalars((loss, combine([part[1] for part in parts])), whole[:2], exact[:2])


def combine(parts: list[PPOStats]) -> PPOStats:
    """A minibatch's statistics from its micro-batches', as `PPOStats` documents."""
    stacked = PPOStats(*(torch.stack(field).double() for field in zip(*parts, strict=True)))
    means = PPOStats(*((field * stacked.tokens).sum() / stacked.tokens.sum() for field in stacked))
    sums = {name: getattr(stacked, name).sum() for name in ("policy_loss", "value_loss", "kl_loss", "tokens")}
    return PPOStats(*(x.float() for x in means._replace(**sums, ratio_max=stacked.ratio_max.max())))


def packed(batch: dict) -> tuple[dict, torch.Tensor]:
    """Rows of [B, T] cut to lengths 0, 1, 2 ... of their tokens and laid end to end."""
    lengths = torch.arange(batch["mask"].shape[0]) * 37 % batch["mask"].shape[1]
    inside = torch.arange(batch["mask"].shape[1]) < lengths.unsqueeze(1)
    batch["mask"] &= inside
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    return {name: x[inside] for name, x in batch.items()}, cu_seqlens


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_equals_padded(backend, variant):
    """Padding is a mask: the same numbers with it and without, empty sequences included."""
    padded = make_batch(9, 130)
    flat, cu_seqlens = packed(padded)
    compare(flat | {"cu_seqlens": cu_seqlens}, **VARIANTS[variant])
    a = run(ppo_loss, padded, **VARIANTS[variant])
    b = run(ppo_loss, flat, cu_seqlens=cu_seqlens, **VARIANTS[variant])
    exact = run(reference, widened(padded), **VARIANTS[variant])
    compare_scalars(a[:2], b[:2], exact[:2])
    for name in GRADIENTS:
        if exact[2][name] is not None:
            ours, expected = b[2][name][flat["mask"]], exact[2][name][padded["mask"]]
            assert_as_exact_as_native(ours, a[2][name][padded["mask"]], expected, name)


@pytest.mark.parametrize("variant", ["everything", "gspo", "token-sum"])
@pytest.mark.parametrize("lengths", [[30000], [9000, 1, 0, 700, 9000]], ids=str)
def test_long_batches(backend, variant, lengths):
    """Longer than what a GPU's block takes at once, in few sequences: several warps share each."""
    batch = make_batch(sum(lengths), share=0.9)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    compare(batch | {"cu_seqlens": cu_seqlens}, **VARIANTS[variant])


def test_strides(backend):
    batch = make_batch(6, 50)
    expected, exact = run(ppo_loss, batch, **EVERYTHING), run(reference, widened(batch), **EVERYTHING)
    transposed = {name: x.T.contiguous().T for name, x in batch.items()}
    padded = {name: torch.cat([x, x], 1)[:, :50] for name, x in batch.items()}
    for views in (transposed, padded):
        assert not views["mask"].is_contiguous()
        ours = run(ppo_loss, views, **EVERYTHING)
        assert_as_exact_as_native(ours[0], expected[0], exact[0])
        assert all(torch.equal(ours[2][name], expected[2][name]) for name in GRADIENTS)


def test_expanded_advantages_and_upstream(backend):
    """One advantage a sequence, expanded over its tokens (stride 0), and an upstream gradient of stride 0."""
    batch = make_batch(4, 30, share=1.0)
    batch["advantages"] = torch.randn(4, 1).expand(4, 30)
    compare(batch, **EVERYTHING)
    leaf = batch["logprobs"].clone().requires_grad_()
    ppo_loss(**(batch | {"logprobs": leaf})).loss.expand(3).sum().backward()
    once = run(ppo_loss, batch)[2]["logprobs"]
    assert_rounds_to(leaf.grad, 3 * once.double())


def test_gradients_only_where_wanted(fast_backend):
    batch = make_batch(3, 20, share=1.0)
    assert not ppo_loss(**batch).loss.requires_grad
    values = batch["values"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ppo_loss(**(batch | {"values": values})).loss, values)
    assert torch.equal(gradient, run(ppo_loss, batch)[2]["values"])
    with torch.no_grad():
        assert not ppo_loss(**(batch | {"values": values})).loss.requires_grad


def test_backward_twice(fast_backend):
    leaf = torch.randn(5, requires_grad=True)
    loss = ppo_loss(leaf, leaf.detach(), torch.randn(5)).loss
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, leaf, retain_graph=True)[0], first)


def test_statistics_carry_no_graph(backend):
    leaf = torch.randn(5, requires_grad=True)
    loss, stats = ppo_loss(leaf, leaf.detach(), torch.randn(5))
    assert loss.requires_grad and not any(x.requires_grad for x in stats)
    assert all(x.shape == () and x.dtype == torch.float32 for x in stats)


# Determinism, registration


def test_bits_do_not_depend_on_threads(cpu_backend):
    batch = make_batch(11, 3001)
    whole = run(ppo_loss, batch, **VARIANTS["gspo-dual-truncate"])
    threads = torch.get_num_threads()
    try:
        for count in (1, 5):
            torch.set_num_threads(count)
            again = run(ppo_loss, batch, **VARIANTS["gspo-dual-truncate"])
            assert torch.equal(whole[0], again[0]) and torch.equal(torch.stack([*whole[1]]), torch.stack([*again[1]]))
            assert all(torch.equal(whole[2][name], again[2][name]) for name in GRADIENTS)
    finally:
        torch.set_num_threads(threads)


def isa_outputs() -> list[torch.Tensor]:
    outputs = []
    for dtype in DTYPES:
        torch.manual_seed(0)
        batch = make_batch(5, 333, dtype=dtype)
        for options in VARIANTS.values():
            loss, stats, gradients = run(ppo_loss, batch, **options)
            outputs += [loss, *stats, *(x.float() for x in gradients.values() if x is not None)]
    return outputs


def test_bits_do_not_depend_on_instruction_set(cpu_backend):
    assert_same_bits_on_every_isa(__name__)


DEFAULTS = PPOOptions(0.2, 0.2, None, None, 0.5, 0.0, "k3", 0.0, "clip", None, (0.5, 2.0)).codes()
ALL_TERMS = PPOOptions(0.2, 0.2, 1.5, 0.2, 0.5, 0.1, "k3+", 0.1, "clip", "mask", (0.5, 2.0)).codes()


@pytest.mark.parametrize(
    "options",
    [
        (*DEFAULTS, "token", "token-mean", [True, True, False]),
        (*ALL_TERMS, "sequence", "seq-mean-token-mean", [True, True, True]),
    ],
    ids=["defaults", "everything"],
)
def test_opcheck(fast_backend, options):
    batch = make_batch(3, 20)
    for name in GRADIENTS:
        batch[name].requires_grad_()
    order = ("logprobs", "old_logprobs", "advantages", "mask", "values", "old_values", "returns", "ref_logprobs")
    tensors = [batch[name] for name in (*order, "entropy", "rollout_logprobs")]
    torch.library.opcheck(torch.ops.fastppo.ppo_loss, (*tensors, None, None, *options))


def test_denominators_and_lengths_do_not_recompile(fast_backend):
    """Once torch.compile has seen them vary, further values and sizes compile nothing; nor do a tensor's values."""
    step = torch.compile(ppo_loss, fullgraph=True, backend="aot_eager")
    stats = torch._dynamo.utils.counters["stats"]
    for as_denominator in (float, int, torch.tensor):
        torch._dynamo.reset()
        for k, size in enumerate((3, 4, 5, 6)):
            batch, cu_seqlens = packed(make_batch(size, 60 + size))
            options = {"cu_seqlens": cu_seqlens, "aggregation": "seq-mean-token-mean"}
            ours = step(**batch, **options, denominator=as_denominator(7 + k))
            assert torch.equal(ours.loss, ppo_loss(**batch, **options, denominator=7.0 + k).loss)
            if k == 1:
                seen = stats["unique_graphs"]
        assert stats["unique_graphs"] == seen, as_denominator


def test_compiled_gradients(fast_backend):
    batch = make_batch(3, 50)
    compiled = torch.compile(ppo_loss, fullgraph=True, backend="aot_eager")
    a, b = run(compiled, batch, **EVERYTHING), run(ppo_loss, batch, **EVERYTHING)
    assert torch.equal(a[0], b[0])
    assert all(torch.equal(a[2][name], b[2][name]) for name in GRADIENTS)


# Mistakes

ROW = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": ROW}, ValueError, "returns is None, expected a tensor because values is given"),
        ({"returns": ROW}, ValueError, "values is None, expected a tensor because returns is given"),
        ({"old_values": ROW}, ValueError, "values is None, expected a tensor because old_values is given"),
        ({"values": ROW, "returns": ROW, "value_clip": 0.2}, ValueError, "old_values is None.*value_clip is 0.2"),
        ({"kl_coef": 0.1}, ValueError, "ref_logprobs is None.*kl_coef is 0.1"),
        ({"entropy_coef": 0.1}, ValueError, "entropy is None.*entropy_coef is 0.1"),
        ({"rollout_correction": "mask"}, ValueError, "rollout_logprobs is None.*rollout_correction is mask"),
        ({"rollout_correction": "clip"}, ValueError, "rollout_correction is 'clip', expected one of None, 'truncate'"),
        ({"rollout_bounds": (2.0, 0.5)}, ValueError, r"rollout_bounds\[1\] is 0.5"),
        ({"rollout_bounds": 2.0}, TypeError, "rollout_bounds is 2.0, expected"),
        ({"aggregation": "mean"}, ValueError, "aggregation is 'mean', expected one of 'token-mean'"),
        ({"aggregation": "fixed-denominator"}, ValueError, "denominator is None"),
        ({"denominator": 0.0}, ValueError, "denominator is 0.0"),
        ({"denominator": torch.tensor(-1.0)}, ValueError, "denominator is -1.0"),
        ({"denominator": torch.ones(2)}, ValueError, r"denominator has shape \[2\]"),
        ({"clip_low": -0.1}, ValueError, "clip_low is -0.1"),
        ({"clip_high": float("inf")}, ValueError, "clip_high is inf"),
        ({"dual_clip": 1.0}, ValueError, "dual_clip is 1.0"),
        ({"dual_clip": 3.0, "objective": "cispo"}, ValueError, "dual_clip is 3.0, expected None"),
        ({"value_clip": 0.0}, ValueError, "value_clip is 0.0"),
        ({"vf_coef": -1}, ValueError, "vf_coef is -1"),
        ({"kl_kind": "k4"}, ValueError, "kl_kind is 'k4', expected one of 'k1'"),
        ({"ratio_level": "batch"}, ValueError, "ratio_level is 'batch'"),
        ({"objective": "reinforce"}, ValueError, "objective is 'reinforce'"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask has dtype torch.float32, expected bool"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"mask has shape \[3\], expected \[2, 3\]"),
        ({"advantages": torch.zeros(2)}, ValueError, r"advantages has shape \[2\], expected \[2, 3\]"),
        ({"advantages": torch.zeros(2, 3, dtype=torch.long)}, TypeError, "advantages has dtype torch.int64"),
        ({"old_logprobs": [0.0]}, TypeError, "old_logprobs is list"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, r"expected packed tokens \[total\]"),
    ],
)
def test_errors_name_the_argument(fast_backend, change, error, message):
    arguments = {"logprobs": ROW, "old_logprobs": ROW, "advantages": ROW} | change
    if fast_backend == "cuda" and torch.is_tensor(change.get("denominator")) and change["denominator"].dim() == 0:
        assert ppo_loss(**arguments).loss.isnan()  # the host does not wait for the device
        return
    with pytest.raises(error, match=message):
        ppo_loss(**arguments)


OFFSETS_OF_SIX = [[1, 6], [0, 4, 2, 6], [0, 4], [0, 9], [0, -1, 6]]


@pytest.mark.parametrize("aggregation", ["seq-mean-token-sum", "seq-mean-token-mean", "token-mean"])
@pytest.mark.parametrize("offsets", OFFSETS_OF_SIX, ids=str)
def test_wrong_offsets_give_nan_on_a_gpu(fast_backend, offsets, aggregation):
    """The host does not wait for the device: loss and gradient say that something is wrong."""
    if fast_backend == "cpu":
        pytest.skip("the CPU raises")
    level = "sequence" if aggregation == "token-mean" else "token"
    leaf, x = torch.zeros(6, requires_grad=True), torch.ones(6)
    loss, _ = ppo_loss(leaf, x, x, cu_seqlens=torch.tensor(offsets), aggregation=aggregation, ratio_level=level)
    loss.backward()
    assert loss.isnan() and leaf.grad.isnan().all()


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (None, "cu_seqlens is None"),
        ([1, 6], "cu_seqlens holds 1 at position 0"),
        ([0, 4, 2, 6], "cu_seqlens holds 2 at position 2"),
        ([0, 4], "cu_seqlens holds 4 at position 1"),
        ([0, 9], "cu_seqlens holds 9 at position 1"),
        ([[0, 6]], r"cu_seqlens has shape \[1, 2\]"),
    ],
)
def test_errors_of_packed_sequences(cpu_backend, cu_seqlens, message):
    x = torch.zeros(6)
    offsets = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    with pytest.raises(ValueError, match=message):
        ppo_loss(x, x, x, cu_seqlens=offsets, ratio_level="sequence")
