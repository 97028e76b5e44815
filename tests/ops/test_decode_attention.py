"""`decode_attention` and `write_kv` against the fp64 reference: ragged lengths, shared heads, windows, sinks, dirty pages."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import decode_attention, use_backend, write_kv
from fastppo.reference.decode_attention import decode_attention as reference
from tests.cases import DTYPES
from tests.tolerance import assert_as_exact_as_native


def make_case(lengths, *, heads=6, kv_heads=2, size=64, value_size=None, page=64, dtype=torch.float32, seed=0):
    """q, caches, tables for sequences of the given lengths on scattered pages; every place that is not used holds NaN."""
    generator = torch.Generator().manual_seed(seed)
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


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (8, 1), (12, 1), (14, 2)])
def test_shared_key_heads(backend, heads, kv_heads):
    compare(make_case([3, 70], heads=heads, kv_heads=kv_heads, size=32))


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


def test_queries_inside_a_larger_tensor(backend):
    """q as a slice of a fused projection."""
    q, *rest = make_case([9, 30], size=32)
    fused = torch.full((2, 10, 32), torch.nan)
    fused[:, 2:8] = q
    assert torch.equal(decode_attention(fused[:, 2:8], *rest), decode_attention(q, *rest))
    heads_last = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(decode_attention(heads_last, *rest), decode_attention(q, *rest))


def test_bits_do_not_depend_on_the_batch_pages_or_threads(cpu_backend):
    lengths = [1, 130, 64, 7]
    together = decode_attention(*make_case(lengths, page=64))
    q, k_pages, v_pages, table, lens = make_case(lengths, page=64)
    for i in range(len(lengths)):
        alone = decode_attention(q[i : i + 1], k_pages, v_pages, table[i : i + 1], lens[i : i + 1])
        assert torch.equal(alone[0], together[i])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(decode_attention(q, k_pages, v_pages, table, lens), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_then_read(backend, dtype):
    """Scattered places, skipped tokens, a strided source."""
    k_pages, v_pages = torch.zeros(3, 4, 2, 8, dtype=dtype), torch.zeros(3, 4, 2, 6, dtype=dtype)
    fused = torch.randn(5, 4, 8).to(dtype)
    k, v = fused[:, 1:3], torch.randn(5, 2, 6).to(dtype)
    slots = torch.tensor([11, 0, -1, 5, 6])
    write_kv(k, v, k_pages, v_pages, slots)
    for i, slot in enumerate(slots.tolist()):
        if slot >= 0:
            assert torch.equal(k_pages.view(12, 2, 8)[slot], k[i]) and torch.equal(v_pages.view(12, 2, 6)[slot], v[i])
    assert int(k_pages.view(12, -1).any(1).sum()) == 4, "nothing else was written"


def test_opcheck(cpu_backend):
    case = make_case([5, 20], size=32)
    torch.library.opcheck(torch.ops.fastppo.decode_attention, (*case, 0.2, 0.0, 0, None))
    k, v = torch.randn(2, 2, 32), torch.randn(2, 2, 32)
    k_pages, v_pages = torch.zeros(2, 4, 2, 32), torch.zeros(2, 4, 2, 32)
    torch.library.opcheck(torch.ops.fastppo.write_kv, (k, v, k_pages, v_pages, torch.tensor([3, 4])))


def test_errors_name_the_argument(cpu_backend):
    q, k_pages, v_pages, table, lens = case = make_case([5, 20], size=32)
    with pytest.raises(ValueError, match=r"context_lens\[1\] is 65"):
        decode_attention(q, k_pages, v_pages, table, torch.tensor([5, 65], dtype=torch.int32))
    with pytest.raises(ValueError, match="pages in"):
        decode_attention(q, k_pages, v_pages, table + 100, lens)
    with pytest.raises(TypeError, match="block_table has dtype torch.int64"):
        decode_attention(q, k_pages, v_pages, table.long(), lens)
    with pytest.raises(TypeError, match="k_pages has dtype torch.float16"):
        decode_attention(q, k_pages.half(), v_pages, table, lens)
    with pytest.raises(ValueError, match="multiple of Hkv"):
        decode_attention(q[:, :5], *case[1:])
    with pytest.raises(ValueError, match="window is 0"):
        decode_attention(*case, window=0)
    with pytest.raises(ValueError, match=r"slots\[0\] is 8"):
        write_kv(
            torch.zeros(1, 2, 8),
            torch.zeros(1, 2, 8),
            torch.zeros(2, 4, 2, 8),
            torch.zeros(2, 4, 2, 8),
            torch.tensor([8]),
        )


def test_reference_equals_plain_attention():
    """The specification itself: torch's scaled_dot_product_attention on one sequence."""
    q, k_pages, v_pages, table, lens = make_case([37], heads=4, kv_heads=4, size=16, page=16)
    keys = k_pages[table[0].long()].flatten(0, 1)[:37].transpose(0, 1)
    values = v_pages[table[0].long()].flatten(0, 1)[:37].transpose(0, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(q[0][:, None], keys, values)[:, 0]
    with use_backend("reference"):
        assert torch.allclose(decode_attention(q, k_pages, v_pages, table, lens)[0], expected, atol=1e-6)
