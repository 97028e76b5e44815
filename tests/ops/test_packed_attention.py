"""`packed_attention` and its gradients against the fp64 reference: ragged sequences, shared prompts, shared heads, windows, NaN."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from fastppo.ops import decode_attention, packed_attention
from fastppo.reference.packed_attention import packed_attention as reference
from tests.cases import DTYPES, seeded, with_threads
from tests.isa import assert_same_bits_on_every_isa
from tests.tolerance import assert_as_exact_as_native, assert_no_worse_than

# A prompt longer than a kernel's block, three that follow it, of which one is empty; a prompt of one token and one that follows it; one alone.
LENGTHS, PROMPTS = [35, 18, 0, 1, 1, 3, 33], [-1, 0, 0, 0, -1, 4, -1]
# Query and key heads; interpreted, each takes a fifth of a second more.
HEADS, KV_HEADS = (2, 1) if os.environ.get("TRITON_INTERPRET") == "1" else (4, 2)


def make_case(
    lengths=LENGTHS, *, heads=HEADS, kv_heads=KV_HEADS, size=16, dtype=torch.float32, seed=0
) -> tuple[Tensor, ...]:
    """q, k, v and cu_seqlens."""
    generator = seeded(seed)
    total = sum(lengths)
    q, k, v = (torch.randn(total, count, size, generator=generator) for count in (heads, kv_heads, kv_heads))
    return q.to(dtype), k.to(dtype), v.to(dtype), torch.tensor([0, *lengths]).cumsum(0)


def run(function, case, d_out: Tensor, **options) -> list[Tensor]:
    """The result and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in case[:3]]
    out = function(*leaves, case[3], **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def assert_as_exact(ours: list[Tensor], native: list[Tensor], exact: list[Tensor]) -> None:
    """Gradients are sums over differences p (d_out v - d_out out) that cancel in other places than those of a softmax's own gradient."""
    assert_as_exact_as_native(ours[0], native[0], exact[0], "out")
    for what, found, beside, truth in zip(("d_q", "d_k", "d_v"), ours[1:], native[1:], exact[1:], strict=True):
        assert_no_worse_than(found, beside, truth, what)


def compare(case, prompts=PROMPTS, **options):
    q, k, v, offsets = case
    options["prompts"] = None if prompts is None else torch.tensor(prompts)
    d_out = torch.randn(q.shape, generator=seeded(1)).to(q.dtype)
    ours = run(packed_attention, case, d_out, **options)
    options["scale"] = options.get("scale", q.shape[-1] ** -0.5)
    native = run(reference, case, d_out, **options)
    exact = run(reference, (q.double(), k.double(), v.double(), offsets), d_out.double(), **options)
    assert all(x.dtype == q.dtype for x in ours)
    assert_as_exact(ours, native, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 16, 64, 80])
def test_head_sizes_and_dtypes(backend, size, dtype):
    compare(make_case(size=size, dtype=dtype))


@pytest.mark.parametrize("size", [256, 258])
def test_the_largest_head_and_one_that_is_larger(backend, size):
    compare(make_case([5, 18], size=size), prompts=[-1, 0])


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (5, 1), (6, 2)])
def test_shared_key_heads(backend, heads, kv_heads):
    compare(make_case([5, 18, 3], heads=heads, kv_heads=kv_heads, size=8), prompts=[-1, 0, -1])


@pytest.mark.parametrize("window", [2, 7, 33, 1000, 2**40])
def test_windows(backend, window):
    """Inside a sequence, across the border of its prompt, and wider than all."""
    compare(make_case(size=8), window=window)


def test_a_window_of_one_sees_the_token_alone(backend):
    q, k, v, offsets = make_case(size=8)
    out = packed_attention(q, k, v, offsets, window=1, prompts=torch.tensor(PROMPTS))
    assert torch.equal(out, v.repeat_interleave(2, dim=1))


def test_without_prompts(backend):
    compare(make_case(size=8), prompts=[-1] * 7)
    compare(make_case(size=8), prompts=None, window=9)


def test_sequences_longer_than_a_block(fast_backend):
    """Of a GPU's kernels too, in bfloat16 128 queries; the window ends inside a tile."""
    compare(make_case([130, 20], dtype=torch.bfloat16), prompts=[-1, 0], window=90)


def test_scale(backend):
    compare(make_case(heads=4, kv_heads=2, size=8), scale=0.7)


def test_scores_far_apart(backend):
    """exp never overflows, and a late larger maximum rescales what was gathered. Integers: the scores themselves are exact."""
    q, k, v, offsets = make_case(size=16)
    case = (q * 40).round(), (k * 4).round(), v
    native, exact = (reference(*(x.to(dtype) for x in case), offsets, scale=0.25) for dtype in (q.dtype, torch.float64))
    assert_as_exact_as_native(packed_attention(*case, offsets), native, exact)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_nothing_to_attend(fast_backend, lengths):
    case = make_case(lengths)
    found = run(packed_attention, case, torch.empty(0, HEADS, 16), prompts=torch.tensor([-1] * len(lengths)).long())
    assert [x.shape[:2] for x in found] == [(0, HEADS), (0, HEADS), (0, KV_HEADS), (0, KV_HEADS)]


def test_other_layouts_and_integers(backend):
    """q, k and v as slices of a fused projection, heads first, elements apart; NaN between."""
    size = (
        8 if backend == "reference" else 32
    )  # where torch's sums follow the strides, and Triton's kernels take no padded copy
    q, k, v, offsets = make_case(size=size)
    prompts = torch.tensor(PROMPTS)
    expected = packed_attention(q, k, v, offsets, prompts=prompts)
    fused = torch.full((len(q), HEADS + 2 * KV_HEADS + 3, size), torch.nan)
    slices = [fused[:, start:][:, : x.shape[1]] for start, x in ((1, q), (HEADS + 2, k), (HEADS + KV_HEADS + 2, v))]
    for part, x in zip(slices, (q, k, v), strict=True):
        part.copy_(x)
    heads_first, elements_apart = (
        [x.transpose(*axes).contiguous().transpose(*axes) for x in (q, k, v)] for axes in ((0, 1), (1, 2))
    )
    for layout in (slices, heads_first, elements_apart):
        assert torch.equal(packed_attention(*layout, offsets.int(), prompts=prompts.int()), expected)


@pytest.mark.parametrize("bad", [0, 1, 6])
def test_nan_stays_with_those_that_see_it(backend, bad):
    """In a prompt, in one that follows it, in one alone. A prompt's keys get gradients from all that follow it, and with them their NaN."""
    case = make_case(size=8)
    q, k, v, offsets = case
    prompts = torch.tensor(PROMPTS)
    expected = run(packed_attention, case, torch.ones_like(q), prompts=prompts)
    rows = slice(int(offsets[bad]), int(offsets[bad + 1]))
    dirty = [x.clone() for x in (q, k, v)]
    for x in dirty:
        x[rows] = torch.nan
    found = run(packed_attention, (*dirty, offsets), torch.ones_like(q), prompts=prompts)
    sequence = torch.repeat_interleave(torch.arange(7), offsets.diff())
    sees = (sequence == bad) | (prompts[sequence] == bad)
    gives = sees | (sequence == prompts[bad])
    for x, before, dirty_rows in zip(found, expected, (sees, sees, gives, gives), strict=True):
        assert torch.equal(x.isnan().flatten(1).any(1), dirty_rows)
        assert torch.equal(x[~dirty_rows], before[~dirty_rows])


def test_nan_reaches_no_earlier_token(cpu_backend):
    """On a GPU it reaches those of its sequence that share a tile with it."""
    q, k, v, offsets = make_case([40], size=8)
    k[25], v[30] = torch.nan, torch.inf
    d_out = torch.ones_like(q)
    ours, plain = (run(function, (q, k, v, offsets), d_out, scale=0.3) for function in (packed_attention, reference))
    for x, expected in zip(ours, plain, strict=True):
        assert torch.equal(x.isfinite(), expected.isfinite())
    assert ours[0][:25].isfinite().all() and ours[0][25:].isnan().all()


def test_every_token_has_the_bits_of_a_decode_step(cpu_backend):
    for size, window in ((64, None), (80, None), (16, 21)):
        q, k, v, offsets = make_case(size=size)
        out = packed_attention(q, k, v, offsets, window=window, prompts=torch.tensor(PROMPTS))
        for number, prompt in enumerate(PROMPTS):
            own = torch.arange(offsets[number], offsets[number + 1])
            before = torch.arange(offsets[prompt], offsets[prompt + 1]) if prompt >= 0 else own[:0]
            rows = torch.cat([before, own])
            pages = [F.pad(x[rows], (0, 0, 0, 0, 0, 64 - len(rows))).view(4, 16, KV_HEADS, size) for x in (k, v)]
            table = torch.arange(4).expand(len(own), -1)
            lens = len(before) + 1 + torch.arange(len(own))
            assert torch.equal(decode_attention(q[own], *pages, table, lens, window=window), out[own])


def test_bits_do_not_depend_on_threads(cpu_backend):
    case, prompts = make_case(size=64), torch.tensor(PROMPTS)
    d_out = torch.randn(case[0].shape)
    alone = with_threads(1, lambda: run(packed_attention, case, d_out, prompts=prompts))
    for threads in (2, 3):
        found = with_threads(threads, lambda: run(packed_attention, case, d_out, prompts=prompts))
        assert all(map(torch.equal, found, alone))


def test_bits_do_not_depend_on_the_packing(fast_backend):
    q, k, v, offsets = case = make_case(size=64)
    d_out = torch.randn(q.shape)
    whole = run(packed_attention, case, d_out, prompts=torch.tensor(PROMPTS))
    rows = slice(int(offsets[4]), int(offsets[6]))  # the second prompt and what follows it, by themselves
    part = (*(x[rows] for x in (q, k, v)), torch.tensor([0, 1, 4]))
    found = run(packed_attention, part, d_out[rows], prompts=torch.tensor([-1, 0]))
    assert all(torch.equal(ours, x[rows]) for ours, x in zip(found, whole, strict=True))


def test_more_sequences_than_a_block_of_the_table(fast_backend, monkeypatch):
    """What follows a prompt stands in another block of offsets than the prompt."""
    if fast_backend == "triton":
        monkeypatch.setattr("fastppo.kernels.packed_attention.LAYOUT_BLOCK", 4)
    compare(make_case([3, 2, 1, 0, 2, 1, 1], size=8), prompts=[-1, 0, -1, 0, 2, 0, 2])


def isa_outputs():
    case = make_case(size=80)
    return run(packed_attention, case, torch.ones_like(case[0]), prompts=torch.tensor(PROMPTS))


def test_same_bits_with_avx2_and_avx512(cpu_backend):
    """The plain kernel has no fused multiply-add to use."""
    assert_same_bits_on_every_isa(__name__, but="plain")


def test_shared_prompts_give_what_copies_give(backend):
    """The specification itself: torch's attention over each sequence with a copy of its prompt."""
    q, k, v, offsets = make_case([20, 7, 11], heads=4, kv_heads=4)
    d_out = torch.randn(q.shape)
    prompts = torch.tensor([-1, 0, 0])

    def copies(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, **_) -> Tensor:
        outs = []
        for number, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
            rows = torch.cat([torch.arange(20 if number else 0), torch.arange(start, end)])
            heads = (x[rows].transpose(0, 1) for x in (q, k, v))
            outs.append(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(0, 1)[start - end :])
        return torch.cat(outs)

    ours = run(packed_attention, (q, k, v, offsets), d_out, prompts=prompts)
    native = run(copies, (q, k, v, offsets), d_out)
    exact = run(copies, (q.double(), k.double(), v.double(), offsets), d_out.double())
    assert_as_exact(ours, native, exact)


# What a caller may get wrong: (offsets, prompts), the error where the host looks, and the sequences that are NaN where it does not.
FAULTS = {
    "first offset": ([1, 4, 9], [-1, -1], "cu_seqlens holds 1 at position 0", [0, 1]),
    "order": ([0, 10, 9], [-1, -1], "cu_seqlens holds 10 at position 1", [0, 1]),
    "last offset": ([0, 4, 8], [-1, -1], "cu_seqlens holds 8 at position 2", [0, 1]),
    "prompt beyond": ([0, 4, 9], [-1, 9], "prompts holds 9 at position 1", [1]),
    "prompt negative": ([0, 4, 9], [-1, -2], "prompts holds -2 at position 1", [1]),
    "prompt later": ([0, 4, 9], [1, -1], "prompts holds 1 at position 0", [0]),
    "prompt of itself": ([0, 4, 9], [-1, 1], "prompts holds 1 at position 1", [1]),
    "prompt of a prompt": ([0, 4, 6, 9], [-1, 0, 1], "prompts holds 1 at position 2", [2]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_tables(backend, fault):
    """ValueError, or NaN where the host does not wait for the device; no access outside the tensors."""
    offsets, prompts, message, bad = FAULTS[fault]
    case = (*make_case([9], size=8)[:3], torch.tensor(offsets))
    d_out = torch.ones_like(case[0])
    if backend in ("reference", "cpu"):
        with pytest.raises(ValueError, match=message):
            packed_attention(*case, prompts=torch.tensor(prompts))
        return
    good = torch.ones(9, dtype=torch.bool)
    for number in bad:
        good[offsets[number] if len(bad) == 1 else 0 : offsets[number + 1] if len(bad) == 1 else 9] = False
    for x in run(packed_attention, case, d_out, prompts=torch.tensor(prompts)):
        assert torch.equal(x.isfinite().flatten(1).all(1), good) and torch.equal(x.isnan().flatten(1).all(1), ~good)


def test_opcheck(fast_backend):
    q, k, v, offsets = case = make_case([5, 3], size=8)
    options = (torch.tensor([-1, 0]), 0.3, 4, fast_backend)
    out, lse = torch.ops.fastppo.packed_attention(*case, *options)
    backward = (torch.ones_like(q), *case, options[0], out, lse, *options[1:])
    torch.library.opcheck(torch.ops.fastppo.packed_attention_backward, backward)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.fastppo.packed_attention, (*leaves, offsets, *options))


def test_compiles_without_graph_breaks(fast_backend):
    """One graph for every number of tokens and sequences. (Sizes that are equal in the first call would count as one: none is.)"""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(packed_attention, fullgraph=True, backend=counter, dynamic=True)
    for lengths, prompts in (([5, 7, 9], [-1, 0, -1]), ([6, 12], [-1, 0]), ([3, 4, 5, 6], [-1, -1, 1, 0])):
        case = make_case(lengths, heads=2, kv_heads=1, size=8)
        d_out, options = torch.ones_like(case[0]), {"prompts": torch.tensor(prompts)}
        found, expected = (run(function, case, d_out, **options) for function in (compiled, packed_attention))
        assert all(map(torch.equal, found, expected))
    assert counter.frame_count == 1


def test_float64_has_every_derivative(backend):
    case = make_case([3, 2, 2], heads=2, kv_heads=1, size=4)
    leaves = [x.double().requires_grad_() for x in case[:3]]

    def attend(*leaves: Tensor) -> Tensor:
        return packed_attention(*leaves, case[3], prompts=torch.tensor([-1, 0, 0]), window=4)

    assert torch.autograd.gradcheck(attend, leaves)
    assert torch.autograd.gradgradcheck(attend, leaves)


Q, K, OFFSETS = torch.ones(4, 6, 8), torch.ones(4, 2, 8), torch.tensor([0, 3, 4])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((Q.int(), K, K, OFFSETS), {}, TypeError, "q has dtype torch.int32"),
        ((Q, K.half(), K, OFFSETS), {}, TypeError, "k has dtype torch.float16, expected torch.float32 like q"),
        ((Q, K, K.half(), OFFSETS), {}, TypeError, "v has dtype torch.float16, expected torch.float32 like q"),
        ((Q, K, None, OFFSETS), {}, TypeError, "v is NoneType, expected a torch.Tensor"),
        ((Q[0], K, K, OFFSETS), {}, ValueError, r"q has shape \[6, 8\], expected \[T, Hq, D\]"),
        ((Q, K[:3], K, OFFSETS), {}, ValueError, r"k has shape \[3, 2, 8\], expected \[4, Hkv, 8\]"),
        ((Q, K[:, :0], K, OFFSETS), {}, ValueError, r"k has shape \[4, 0, 8\], .* Hkv at least 1"),
        ((Q[:, :5], K, K, OFFSETS), {}, ValueError, "q has 5 heads and k 2, expected Hq to be a multiple of Hkv"),
        ((Q, K, K[..., :4], OFFSETS), {}, ValueError, r"v has shape \[4, 2, 4\], expected \[4, 2, 8\]"),
        ((Q, K, K, OFFSETS.float()), {}, TypeError, "cu_seqlens has dtype torch.float32"),
        ((Q, K, K, OFFSETS[None]), {}, ValueError, r"cu_seqlens has shape \[1, 3\]"),
        ((Q, K, K, OFFSETS), {"prompts": OFFSETS}, ValueError, r"prompts has shape \[3\], expected \[2\]"),
        ((Q, K, K, OFFSETS), {"prompts": [-1, 0]}, TypeError, "prompts is list"),
        ((Q, K, K, OFFSETS), {"window": 0}, ValueError, "window is 0"),
        ((Q, K, K, OFFSETS), {"window": 1.5}, TypeError, "window is 1.5"),
        ((Q, K, K, OFFSETS), {"scale": torch.inf}, ValueError, "scale is inf"),
    ],
)
def test_errors_name_the_argument(backend, arguments, options, error, message):
    with pytest.raises(error, match=message):
        packed_attention(*arguments, **options)
