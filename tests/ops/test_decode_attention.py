"""`decode_attention` and `write_kv` against the fp64 reference: ragged lengths, shared heads, windows, sinks, dirty pages."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastppo.ops import decode_attention, use_backend, write_kv
from fastppo.reference.decode_attention import decode_attention as reference
from tests.cases import DTYPES, seeded
from tests.tolerance import assert_as_exact_as_native


def make_case(lengths, *, heads=6, kv_heads=2, size=64, value_size=None, page=64, dtype=torch.float32, seed=0):
    """q, caches, tables for sequences of the given lengths on scattered pages; every place that is not used holds NaN."""
    generator = seeded(seed)
    blocks = max(1, -(-max(lengths, default=0) // page))
    pages = len(lengths) * blocks + 1
    order = torch.randperm(pages, generator=generator)[: len(lengths) * blocks].view(len(lengths), blocks)
    k_pages = torch.full((pages, page, kv_heads, size), torch.nan, dtype=dtype)
    v_pages = torch.full((pages, page, kv_heads, value_size or size), torch.nan, dtype=dtype)
    for i, length in enumerate(lengths):
        for position in range(length):
            place = (order[i, position // page], position % page)
            k_pages[place] = torch.randn(k_pages.shape[2:], generator=generator).to(dtype)
            v_pages[place] = torch.randn(v_pages.shape[2:], generator=generator).to(dtype)
    q = torch.randn(len(lengths), heads, size, generator=generator).to(dtype)
    return q, k_pages, v_pages, order.int(), torch.tensor(lengths, dtype=torch.int32)


def compare(case, **options):
    q, k_pages, v_pages, table, lens = case
    ours = decode_attention(*case, **options)
    scale = options.pop("scale", q.shape[-1] ** -0.5)
    native = reference(*case, scale=scale, **options)
    sinks = options.pop("sinks", None)
    options["sinks"] = None if sinks is None else sinks.double()
    exact = reference(q.double(), k_pages.double(), v_pages.double(), table, lens, scale=scale, **options)
    assert ours.dtype == q.dtype
    assert_as_exact_as_native(ours, native, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 16, 20, 64, 80, 128, 256, 258])
def test_head_sizes_and_dtypes(backend, size, dtype):
    compare(make_case([1, 15, 16, 17, 130], size=size, dtype=dtype))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (8, 1), (12, 1), (14, 2), (40, 2)])
def test_shared_key_heads(backend, heads, kv_heads):
    compare(make_case([3, 70], heads=heads, kv_heads=kv_heads, size=32))


# A GPU takes 512 keys at a time: lengths beside those splits, and more of them than its second kernel merges at once.
LONG = [1, 511, 512, 513, 1100]


@pytest.mark.parametrize("window", [None, 1, 500, 513, 600])
def test_long_sequences(backend, window):
    case = make_case(LONG, size=16)
    compare(case, window=window)
    compare(case, window=window, sinks=torch.linspace(-3, 3, 6), softcap=4.0)


def test_very_long_sequence(backend):
    compare(make_case([20 * 512 + 3], heads=2, kv_heads=1, size=8))


@pytest.mark.parametrize("page", [1, 16, 60, 64])
def test_page_sizes(backend, page):
    compare(make_case([1, 61, 64, 65], page=page, size=32))


@pytest.mark.parametrize("window", [1, 7, 16, 50, 1000])
def test_windows(backend, window):
    compare(make_case([1, 16, 49, 51, 100], size=32), window=window)


def test_softcap_scale_and_sinks(backend):
    case = make_case([2, 40, 90], size=32)
    compare(case, softcap=5.0, scale=0.7)
    compare(case, sinks=torch.linspace(-3, 3, 6))
    compare(case, sinks=torch.linspace(-3, 3, 6), window=10, softcap=2.0)


def test_values_of_another_size(backend):
    compare(make_case([33, 5], size=48, value_size=32))


def test_scores_far_apart(backend):
    """exp never overflows, and a late larger maximum rescales what was gathered."""
    q, k_pages, v_pages, table, lens = make_case([100], size=16)
    compare((q * 300, k_pages, v_pages, table, lens))


def test_empty_sequences_and_batches(backend):
    out = decode_attention(*make_case([0, 5, 0], size=32))
    assert (out[0] == 0).all() and (out[2] == 0).all() and out[1].isfinite().all()
    assert decode_attention(*make_case([], size=32)).shape == (0, 6, 32)


@pytest.mark.parametrize("options", [{}, {"window": 12}, {"sinks": torch.linspace(-3, 3, 6), "softcap": 3.0}], ids=str)
@pytest.mark.parametrize("first", [0, 60])
def test_consecutive_tokens_of_one_prompt(fast_backend, first, options):
    """Rows that share their pages, as a prefill has them: each row has the bits that it has alone, and sees no later key."""
    _, k_pages, v_pages, table, _ = make_case([90], size=32)
    rows = 27 if fast_backend == "cpu" else 9  # where a row is a program of a GPU, and may be interpreted
    q = torch.randn(rows + 2, 6, 32, generator=seeded(1))
    lens = torch.tensor([90, *range(first, first + rows), 7], dtype=torch.int32)
    table = table.expand(rows + 2, -1).contiguous()
    together = decode_attention(q, k_pages, v_pages, table, lens, **options)
    for i in range(rows + 2):
        alone = decode_attention(q[i : i + 1], k_pages, v_pages, table[i : i + 1], lens[i : i + 1], **options)
        assert torch.equal(together[i : i + 1], alone)
    compare((q, k_pages, v_pages, table, lens), **options)


def test_queries_inside_a_larger_tensor(backend):
    """q as a slice of a fused projection."""
    q, *rest = make_case([9, 30], size=32)
    fused = torch.full((2, 10, 32), torch.nan)
    fused[:, 2:8] = q
    assert torch.equal(decode_attention(fused[:, 2:8], *rest), decode_attention(q, *rest))
    heads_last = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(decode_attention(heads_last, *rest), decode_attention(q, *rest))


@pytest.mark.parametrize("options", [{}, {"window": 100}, {"sinks": torch.linspace(-3, 3, 6)}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_batch_or_the_table(fast_backend, dtype, options):
    """Alone, with a block table that is only as wide as the sequence needs, and in a batch whose table is wider."""
    lengths = [1, 130, 64, 7, 600]
    q, k_pages, v_pages, table, lens = case = make_case(lengths, size=32, dtype=dtype)
    together = decode_attention(*case, **options)
    for i, length in enumerate(lengths):
        pages = table[i : i + 1, : -(-length // 64)]
        assert torch.equal(
            decode_attention(q[i : i + 1], k_pages, v_pages, pages, lens[i : i + 1], **options)[0], together[i]
        )


def test_bits_do_not_depend_on_threads(cpu_backend):
    q, k_pages, v_pages, table, lens = case = make_case([1, 130, 64, 7], page=64)
    together = decode_attention(*case)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(decode_attention(q, k_pages, v_pages, table, lens), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("slots_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_write_then_read(backend, dtype, slots_dtype):
    """Scattered places, skipped tokens, a strided source."""
    k_pages, v_pages = torch.zeros(3, 4, 2, 8, dtype=dtype), torch.zeros(3, 4, 2, 6, dtype=dtype)
    fused = torch.randn(5, 4, 8).to(dtype)
    k, v = fused[:, 1:3], torch.randn(5, 2, 6).to(dtype)
    slots = torch.tensor([11, 0, -1, 5, 6], dtype=slots_dtype)
    write_kv(k, v, k_pages, v_pages, slots)
    for i, slot in enumerate(slots.tolist()):
        if slot >= 0:
            assert torch.equal(k_pages.view(12, 2, 8)[slot], k[i]) and torch.equal(v_pages.view(12, 2, 6)[slot], v[i])
    assert int(k_pages.view(12, -1).any(1).sum()) == 4, "nothing else was written"


@pytest.mark.parametrize("unused", [-1, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("length", [0, 1, 64, 65, 1030])
def test_table_entries_that_are_not_used_may_hold_anything(backend, length, unused):
    """Beyond the sequence's length, and before its window."""
    q, k_pages, v_pages, table, lens = make_case([length, 1200], size=16)
    expected = decode_attention(q, k_pages, v_pages, table, lens, window=66)
    used = torch.arange(table.shape[1])
    for i, keys in enumerate((length, 1200)):
        table[i, (used >= -(-keys // 64)) | (used < (keys - 66) // 64)] = unused
    assert torch.equal(decode_attention(q, k_pages, v_pages, table, lens, window=66), expected)


def test_shared_pages(backend):
    """Samples of one prompt have their first pages in common."""
    q, k_pages, v_pages, table, lens = make_case([200, 130], size=16)
    table[1, :2] = table[0, :2]
    k_pages[table[1, 2], :2], v_pages[table[1, 2], :2] = torch.randn(2, 2, 2, 16)
    compare((q, k_pages, v_pages, table, lens))


def test_wider_integers(backend):
    q, k_pages, v_pages, table, lens = case = make_case([5, 80], size=16)
    expected = decode_attention(*case)
    assert torch.equal(decode_attention(q, k_pages, v_pages, table.long(), lens.long()), expected)
    wide = torch.full((2, 2 * table.shape[1]), -1)
    wide[:, ::2] = table
    assert torch.equal(decode_attention(q, k_pages, v_pages, wide[:, ::2], lens), expected)


def test_keys_and_values_in_one_cache(backend):
    """[P, 2, page, Hkv, D], whose halves are contiguous within a page alone; an odd offset moves them off 16 bytes."""
    q, k_pages, v_pages, table, lens = case = make_case([5, 600], size=16)
    expected = decode_attention(*case)
    memory = torch.full((2 * k_pages.numel() + 1,), torch.nan)
    for offset in (0, 1):
        cache = memory[offset : offset + 2 * k_pages.numel()].view(len(k_pages), 2, *k_pages.shape[1:])
        cache[:, 0], cache[:, 1] = k_pages, v_pages
        assert torch.equal(decode_attention(q, cache[:, 0], cache[:, 1], table, lens), expected)
        write_kv(torch.ones(1, 2, 16), 2 * torch.ones(1, 2, 16), cache[:, 0], cache[:, 1], torch.tensor([64 * 3 + 5]))
        assert (cache[3, 0, 5] == 1).all() and (cache[3, 1, 5] == 2).all()
        cache[3, 0, 5], cache[3, 1, 5] = k_pages[3, 5], v_pages[3, 5]
        both = torch.stack([k_pages, v_pages], dim=1)
        assert torch.equal(cache.nan_to_num(), both.nan_to_num()), "nothing else was written"


# What a caller may get wrong in its tables, and the error where the host looks at them. `most` keys fill the table.
FAULTS = {
    "first page far beyond": (lambda table, lens, pages, most: table[1, :1].fill_(10_000_000), "pages in"),
    "last page just beyond": (lambda table, lens, pages, most: table[1, -1:].fill_(pages), "pages in"),
    "page negative": (lambda table, lens, pages, most: table[1, 3:4].fill_(-1), "pages in"),
    "length negative": (lambda table, lens, pages, most: lens[1:2].fill_(-1), r"context_lens\[1\] is -1"),
    "length just beyond": (lambda table, lens, pages, most: lens[1:2].fill_(most + 1), r"context_lens\[1\] is \d+1"),
    "length far beyond": (
        lambda table, lens, pages, most: lens[1:2].fill_(2**31 - 1),
        r"context_lens\[1\] is 2147483647",
    ),
}


@pytest.mark.parametrize("most", [320, 640], ids=["one split", "several splits"])
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_tables(fast_backend, fault, most):
    """ValueError, or NaN for that sequence alone where the host does not wait for the device; no access outside the cache."""
    q, k_pages, v_pages, table, lens = case = make_case([3, most, 100, 0], size=16)
    expected = decode_attention(*case)
    change, message = FAULTS[fault]
    change(table, lens, len(k_pages), most)
    if fast_backend == "cpu":
        with pytest.raises(ValueError, match=message):
            decode_attention(*case)
        return
    out = decode_attention(*case)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2, 3]], expected[[0, 2, 3]])


def test_slots_beyond_the_cache(fast_backend):
    """ValueError before anything is written, or skipped where the host does not wait for the device."""
    k_pages, v_pages = torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 2, 6)
    k, v = torch.randn(4, 2, 8), torch.randn(4, 2, 6)
    slots = torch.tensor([2, 12, 2**40, -(2**40)])
    if fast_backend == "cpu":
        with pytest.raises(ValueError, match=r"slots\[1\] is 12"):
            write_kv(k, v, k_pages, v_pages, slots)
        assert not k_pages.any()
        return
    write_kv(k, v, k_pages, v_pages, slots)
    assert torch.equal(k_pages.view(12, 2, 8)[2], k[0]) and torch.equal(v_pages.view(12, 2, 6)[2], v[0])
    assert int(k_pages.view(12, -1).any(1).sum()) == int(v_pages.view(12, -1).any(1).sum()) == 1


def test_opcheck(fast_backend):
    case = make_case([5, 20], size=32)
    torch.library.opcheck(torch.ops.fastppo.decode_attention, (*case, 0.2, 0.0, 0, None, fast_backend))
    k, v = torch.randn(2, 2, 32), torch.randn(2, 2, 32)
    k_pages, v_pages = torch.zeros(2, 4, 2, 32), torch.zeros(2, 4, 2, 32)
    arguments = k, v, k_pages, v_pages, torch.tensor([3, 4]), fast_backend
    torch.library.opcheck(torch.ops.fastppo.write_kv, arguments)


def test_compiles_without_graph_breaks(fast_backend):
    """One graph for every batch size, table width and cache. (Sizes that are equal in the first call would count as one: none is.)"""
    counter = CompileCounterWithBackend("aot_eager")

    def attend(*case):
        return decode_attention(*case, softcap=3.0)

    compiled = torch.compile(attend, fullgraph=True, backend=counter, dynamic=True)
    for lengths in ([5, 20, 200], [70, 3], [1, 2, 3, 4, 600]):
        case = make_case(lengths, size=16)
        assert torch.equal(compiled(*case), attend(*case))
    assert counter.frame_count == 1


def test_errors_name_the_argument(backend):
    q, k_pages, v_pages, table, lens = case = make_case([5, 20], size=32)
    with pytest.raises(TypeError, match="block_table has dtype torch.int16"):
        decode_attention(q, k_pages, v_pages, table.short(), lens)
    with pytest.raises(ValueError, match="contiguous within a page"):
        decode_attention(q, k_pages.transpose(1, 2), v_pages.transpose(1, 2), table, lens)
    with pytest.raises(ValueError, match="at least 1"):
        decode_attention(q, k_pages[:, :0], v_pages[:, :0], table, lens)
    with pytest.raises(ValueError, match="at least 1"):
        decode_attention(q, k_pages[:, :, :0], v_pages[:, :, :0], table, lens)
    with pytest.raises(TypeError, match="k_pages has dtype torch.float16"):
        decode_attention(q, k_pages.half(), v_pages, table, lens)
    with pytest.raises(ValueError, match="multiple of Hkv"):
        decode_attention(q[:, :5], *case[1:])
    with pytest.raises(ValueError, match="window is 0"):
        decode_attention(*case, window=0)
    k, pages = torch.zeros(1, 2, 8), torch.zeros(2, 4, 2, 8)
    with pytest.raises(TypeError, match="v has dtype torch.float16, expected torch.float32 like k"):
        write_kv(k, k.half(), pages, pages.clone(), torch.tensor([0]))
    with pytest.raises(TypeError, match="slots has dtype torch.float32"):
        write_kv(k, k, pages, pages.clone(), torch.tensor([0.0]))
    with pytest.raises(ValueError, match="slots has shape"):
        write_kv(k, k, pages, pages.clone(), torch.tensor([[0]]))


def test_reference_equals_plain_attention():
    """The specification itself: torch's scaled_dot_product_attention on one sequence."""
    q, k_pages, v_pages, table, lens = make_case([37], heads=4, kv_heads=4, size=16, page=16)
    keys = k_pages[table[0].long()].flatten(0, 1)[:37].transpose(0, 1)
    values = v_pages[table[0].long()].flatten(0, 1)[:37].transpose(0, 1)
    attend = torch.nn.functional.scaled_dot_product_attention
    exact = attend(q[0][:, None].double(), keys.double(), values.double())[:, 0]
    with use_backend("reference"):
        ours = decode_attention(q, k_pages, v_pages, table, lens)[0]
    assert_as_exact_as_native(ours, attend(q[0][:, None], keys, values)[:, 0], exact)
