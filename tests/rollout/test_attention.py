"""The attention by itself, against its formula one sequence at a time in fp64."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from torch import nn

from fastppo.model.attention import (
    AttentionOptions,
    LayerShape,
    MissingContextError,
    PackedContext,
    attention_forward,
)
from fastppo.rollout.contexts import ChunkContext, DecodeContext, PrefillContext
from fastppo.rollout.pages import PAGE_SIZE, PagedCache, PagePool
from tests.tolerance import assert_rounds_to

HEADS, KV_HEADS, SIZE, VALUE_SIZE = 4, 2, 8, 6


def _options(case: str) -> AttentionOptions:
    return {
        "plain": AttentionOptions(0.3),
        "window": AttentionOptions(0.3, window=5),
        "softcap": AttentionOptions(0.3, softcap=1.5),
        "sinks": AttentionOptions(0.3, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)),
        "all": AttentionOptions(0.3, 5, 1.5, torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)),
    }[case]


CPU = torch.device("cpu")
CASES = ["plain", "window", "softcap", "sinks", "all"]


def _bounds(lengths: list[int]) -> list[int]:
    return [0, *accumulate(lengths)]


def _inputs(total: int) -> list[torch.Tensor]:
    shapes = [(HEADS, total, SIZE), (KV_HEADS, total, SIZE), (KV_HEADS, total, VALUE_SIZE)]
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def _formula(q, k, v, options: AttentionOptions) -> torch.Tensor:
    """One sequence, one head and one query after another: q [Hq, L, D] -> [L, Hq, Dv]."""
    out = []
    for t in range(q.shape[1]):
        first = 0 if options.window is None else max(0, t + 1 - options.window)
        for head in range(HEADS):
            source = head // (HEADS // KV_HEADS)
            scores = options.scale * k[source, first : t + 1] @ q[head, t]
            if options.softcap is not None:
                scores = options.softcap * torch.tanh(scores / options.softcap)
            if options.sinks is not None:
                scores = torch.cat([scores, options.sinks[head : head + 1]])
            out.append(scores.softmax(0)[: t + 1 - first] @ v[source, first : t + 1])
    return torch.stack(out).view(q.shape[1], HEADS, VALUE_SIZE)


@pytest.mark.parametrize("lengths", [[7], [4, 4], [1, 9, 3], [0, 6, 0, 2, 0]], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_packed_values_and_gradients(case, lengths):
    options, bounds = _options(case), _bounds(lengths)
    inputs = _inputs(sum(lengths))
    found = PackedContext(bounds, CPU).attend(0, *inputs, options)
    spans = [slice(a, b) for a, b in pairwise(bounds) if a < b]
    expected = torch.cat([_formula(*(x[:, span] for x in inputs), options) for span in spans])
    assert_rounds_to(found, expected)
    upstream = torch.randn_like(found)
    gradients = (torch.autograd.grad(out, inputs, upstream) for out in (found, expected))
    for name, ours, exact in zip("qkv", *gradients, strict=True):
        assert_rounds_to(ours, exact, f"gradient of {name}")


@pytest.mark.parametrize("case", CASES)
def test_lengths_far_apart_are_padded_in_groups(case):
    options, lengths = _options(case), [300, 2, 140, 1, 290, 130]
    bounds = _bounds(lengths)
    inputs = _inputs(sum(lengths))
    context = PackedContext(bounds, CPU)
    padded = sum(len(group.members) * group.length for group in context.groups)
    assert padded < 2 * sum(lengths)
    found = context.attend(0, *inputs, options)
    alone = [
        PackedContext([0, b - a], CPU).attend(0, *(x[:, a:b] for x in inputs), options) for a, b in pairwise(bounds)
    ]
    assert_rounds_to(found, torch.cat(alone))


def test_nan_stays_in_its_sequence():
    inputs = [x.detach() for x in _inputs(10)]
    for x in inputs:
        x[:, 3:6] = torch.nan
    out = PackedContext([0, 3, 6, 10], CPU).attend(0, *inputs, _options("plain"))
    assert out[:3].isfinite().all() and out[6:].isfinite().all() and out[3:6].isnan().all()


def _cache(pages: int) -> PagedCache:
    """Of one layer, in fp64; full of NaN, as memory that nobody wrote may be."""
    cache = PagedCache({0: LayerShape(KV_HEADS, SIZE, VALUE_SIZE, torch.float64)}, pages, CPU)
    for stored in cache.layers[0]:
        stored.fill_(torch.nan)
    return cache


def _places(pages: list[int], positions: range) -> list[int]:
    return [pages[i // PAGE_SIZE] * PAGE_SIZE + i % PAGE_SIZE for i in positions]


@pytest.mark.parametrize("case", CASES)
def test_prefill_then_decode_equals_packed(case):
    """Three sequences of 62, 1 and 130 tokens, then four more each, in pages that lie anywhere."""
    options, lengths, extra = _options(case), [62, 1, 130], 4
    pages, cache = [[5, 1], [3], [4, 0, 2]], _cache(6)
    full = [length + extra for length in lengths]
    bounds = _bounds(full)
    inputs = [x.detach() for x in _inputs(sum(full))]
    expected = PackedContext(bounds, CPU).attend(0, *inputs, options)

    starts = bounds[:-1]
    prompt_places = torch.tensor([s + i for s, n in zip(starts, lengths, strict=True) for i in range(n)])
    slots = torch.tensor([slot for p, n in zip(pages, lengths, strict=True) for slot in _places(p, range(n))])
    prefill = PrefillContext(_bounds(lengths), cache, slots)
    found = torch.empty_like(expected)
    found[prompt_places] = prefill.attend(0, *(x[:, prompt_places] for x in inputs), options)

    block_table = torch.tensor([[5, 1, 99], [3, 99, 99], [4, 0, 2]], dtype=torch.int32)
    for step in range(extra):
        places = torch.tensor([s + n + step for s, n in zip(starts, lengths, strict=True)])
        context = DecodeContext(cache, block_table, torch.tensor(lengths) + step + 1)
        found[places] = context.attend(0, *(x[:, places] for x in inputs), options)
    assert_rounds_to(found, expected)


@pytest.mark.parametrize("case", CASES)
def test_chunks_of_a_long_sequence_equal_the_whole(case):
    options, length = _options(case), 70
    inputs, pages, cache = [x.detach() for x in _inputs(length)], [2, 0], _cache(3)
    expected = PackedContext([0, length], CPU).attend(0, *inputs, options)
    found = []
    for start in range(0, length, 32):
        chunk = range(start, min(start + 32, length))
        context = ChunkContext([start], cache, [torch.tensor(_places(pages, range(chunk.stop)))])
        found.append(context.attend(0, *(x[:, chunk.start : chunk.stop] for x in inputs), options))
    assert_rounds_to(torch.cat(found), expected)


def test_pages_are_copied_in_every_layer():
    shape = LayerShape(1, 2, 3, torch.float32)
    cache = PagedCache({0: shape, 5: shape}, 3, CPU)
    for pair in cache.layers.values():
        for stored in pair:
            stored[:3] = torch.arange(3.0).view(3, 1, 1, 1)
    cache.copy(torch.tensor([2, 2]), torch.tensor([0, 1]))
    assert all(stored[:3].eq(2).all() for pair in cache.layers.values() for stored in pair)
    assert cache.bytes_per_page == 2 * 64 * 5 * 4


def test_a_page_is_free_when_its_last_owner_gives_it_back():
    pool = PagePool(3)
    pages = pool.take(2)
    pool.share(pages[:1])
    pool.release(pages)
    assert pool.available == 2
    pool.release(pages[:1])
    assert pool.available == 3 and sorted(pool.take(3)) == [0, 1, 2]


class _Layer(nn.Module):
    layer_idx = 0


@pytest.mark.parametrize("keyword", ["attention_mask", "position_bias"])
def test_masks_of_the_model_are_refused(keyword):
    arguments = {"attention_mask": None, keyword: torch.zeros(1), "fastppo": PackedContext([0, 1], CPU)}
    with pytest.raises(ValueError, match="_Layer passes an attention mask or bias"):
        attention_forward(_Layer(), *[torch.zeros(1, 1, 1, 2)] * 3, **arguments)


def test_dropout_is_passed_over():
    """Some layers ask the configuration for it at each call, which `prepare_model` leaves as it came."""
    qkv = [torch.randn(1, 1, 5, 2) for _ in range(3)]
    plain, asked = (
        attention_forward(_Layer().train(), *qkv, None, dropout=dropout, fastppo=PackedContext([0, 5], CPU))[0]
        for dropout in (0.0, 0.9)
    )
    assert torch.equal(plain, asked)


def test_calls_from_elsewhere_are_refused():
    with pytest.raises(MissingContextError, match="set_attn_implementation"):
        attention_forward(_Layer(), *[torch.zeros(1, 1, 1, 2)] * 3, None)
