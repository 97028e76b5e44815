"""A GPU's decode steps of Llama-like models, by Triton kernels between the matrix products: interpreted (tests/test_triton.py) or on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastppo.model.parts import LlamaParts, UnlikeLlama
from fastppo.ops import use_backend
from fastppo.rollout import Engine
from fastppo.rollout.decoder import ModuleDecoder
from fastppo.rollout.graphs import GraphDecoder
from fastppo.rollout.pages import PagedCache
from fastppo.rollout.parts_decoder import FusedDecoder, parts_agree, parts_decoder
from tests.conftest import FAST_BACKEND
from tests.rollout import tiny
from tests.rollout.test_decoder import NATIVE
from tests.tolerance import assert_as_exact_as_native

if FAST_BACKEND != "triton":
    pytest.skip("only for the process that tests Triton's kernels", allow_module_level=True)


# The kernels between the products see heads, their norms and dtypes: what differs from family to family besides is the modules' own.
CASES = [(family, {}, torch.float32) for family in sorted(NATIVE)]
CASES += [(family, {"attention_bias": True, "mlp_bias": True}, torch.bfloat16) for family in ("llama", "qwen2")]
CASES += [("llama", {"head_dim": 20}, torch.float32), ("qwen3", {"head_dim": 20}, torch.bfloat16)]


@pytest.fixture(autouse=True)
def triton_everywhere():
    with use_backend("triton"):
        yield


def make_model(family: str, **settings: object) -> PreTrainedModel:
    return tiny.make_model(family, **settings).to(torch.get_default_device())


def empty_cache(model) -> PagedCache:
    """Every place of it holds NaN."""
    cache = PagedCache(Engine(model).runner.look().shapes, 5, model.device)
    for pages in (pages for pair in cache.layers.values() for pages in pair):
        pages.fill_(torch.nan)
    return cache


def fused(model, cache: PagedCache) -> FusedDecoder:
    modules, seen = ModuleDecoder(model, cache), Engine(model).runner.look()
    return parts_decoder(LlamaParts(model), modules, cache, seen, rows=3, positions=128)


def run(decoder, cache: PagedCache) -> tuple[Tensor, Tensor]:
    """Hidden states of two steps of three sequences: inside a page, at its last place and at the first of the next one. And the cache."""
    prompts, table = [[5, 6, 7], list(range(1, 64)), [9] * 64], [[3, 3], [0, 2], [1, 4]]
    for prompt, pages in zip(prompts, table, strict=True):
        decoder.prefill([prompt], [pages], [0])
    lengths, pages = torch.tensor([4, 64, 65]), torch.tensor(table, dtype=torch.int32)
    hidden = [decoder.step(torch.tensor([11, 12, 13]) + i, lengths + i, pages).clone() for i in range(2)]
    return torch.cat(hidden), torch.stack([pages for pair in cache.layers.values() for pages in pair])


@torch.no_grad()
@pytest.mark.parametrize(("family", "changes", "dtype"), CASES, ids=str)
def test_steps_as_the_modules_do(family, changes, dtype):
    """Hidden states, and what they leave in the cache: as near to fp64 as the modules are, at the same places."""
    model = make_model(family, dtype=dtype, max_position_embeddings=128, **changes)
    wide = make_model(family, dtype=dtype, max_position_embeddings=128, **changes).double()
    cache = empty_cache(model)
    found = run(fused(model, cache), cache)
    cache = empty_cache(model)
    native = run(ModuleDecoder(model, cache), cache)
    with use_backend("reference"):
        cache = empty_cache(wide)
        exact = run(ModuleDecoder(wide, cache), cache)
    assert torch.equal(found[1].isnan(), exact[1].isnan())
    for ours, theirs, truth in zip(found, native, exact, strict=True):
        assert_as_exact_as_native(ours.nan_to_num(), theirs.nan_to_num(), truth.nan_to_num())


def test_the_engine_takes_it():
    model = make_model("qwen3")
    engine, cache = Engine(model), empty_cache(model)
    decoder = engine.runner._decoder(cache, rows=2, positions=70)
    assert type(decoder._decoder if isinstance(decoder, GraphDecoder) else decoder) is FusedDecoder


def test_numbers_tell_what_names_do_not():
    """Granite with a multiplier has Llama's modules and another sum, in a narrow type too."""
    for dtype in (torch.float32, torch.bfloat16):
        for multiplier, agrees in (
            ({}, True),
            ({"residual_multiplier": 0.5}, False),
            ({"embedding_multiplier": 0.5}, False),
        ):
            model = make_model("granite", dtype=dtype, **multiplier)
            seen = Engine(model).runner.look()
            assert parts_agree(LlamaParts(model), model, seen) == agrees


def test_mixed_types_run_their_modules():
    model = make_model("llama", dtype=torch.bfloat16)
    model.model.norm.float()
    with pytest.raises(UnlikeLlama, match="one type"):
        LlamaParts(model)


@pytest.mark.parametrize(("length", "page"), [(0, 0), (129, 0), (70, 9), (70, -1)])
def test_rows_out_of_range_write_nothing(length, page):
    """And their hidden state is NaN, but that of an empty sequence, which sees no key; their neighbour's is finite and its key is written."""
    model = make_model("llama", max_position_embeddings=128)
    cache = empty_cache(model)
    decoder = fused(model, cache)
    decoder.prefill([[1, 2]], [[0]], [0])
    before = [torch.nan_to_num(pages) for pair in cache.layers.values() for pages in pair]
    table = torch.tensor([[3, page], [0, 0]], dtype=torch.int32)
    hidden = decoder.step(torch.tensor([4, 5]), torch.tensor([length, 3]), table)
    assert hidden[0].isnan().all() == (length > 0) and hidden[1].isfinite().all()
    after = [torch.nan_to_num(pages) for pair in cache.layers.values() for pages in pair]
    changed = torch.stack([(b != a).flatten(2).any(-1) for b, a in zip(before, after, strict=True)]).any(0)
    assert changed.nonzero().tolist() == [[0, 2]]
