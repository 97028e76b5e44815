"""Sequences that share prompts: each prompt's tokens run once, and states and gradients are those of every sequence alone."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastppo import Engine, SamplingParams
from fastppo.model import SharedPrompts, lm_head, packed_hidden, prepare_model
from fastppo.model.attention import AttentionOptions, PackedContext
from fastppo.model.shared_prompts import SharedPromptsContext
from tests.rollout.tiny import VOCAB_SIZE, as_transformers_has_it, make_model
from tests.tolerance import assert_as_exact_as_model, assert_rounds_to

CPU = torch.device("cpu")
HEADS, KV_HEADS, SIZE = 4, 2, 8
FAMILIES = ["llama", "mistral-window", "mixtral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox", "phi", "phi3",
            "olmo2", "granite", "cohere2", "gpt_oss", "deepseek_v3"]  # fmt: skip

# Per sequence: which prompt it begins with, and how many tokens follow. Prompts have 9, 1 and 4 tokens.
PROMPT_LENGTHS = (9, 1, 4)
SHAPES = {
    "side by side": [(0, 3), (0, 5), (0, 1), (1, 2), (1, 7)],
    "mixed up, some alone": [(0, 4), (2, 3), (1, 1), (0, 2), (1, 6)],
    "nothing follows": [(0, 0), (0, 4), (2, 0), (2, 0)],
    "one prompt alone": [(0, 2), (0, 2), (0, 2)],
    "only prompts": [(0, 0), (0, 0)],
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bounds_of(shape: list[tuple[int, int]]) -> list[int]:
    return list(accumulate((PROMPT_LENGTHS[prompt] + more for prompt, more in shape), initial=0))


def sequences_of(shape: list[tuple[int, int]]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    prompts = [torch.randint(1, VOCAB_SIZE, (length,)) for length in PROMPT_LENGTHS]
    return [torch.cat([prompts[prompt], torch.randint(1, VOCAB_SIZE, (more,))]) for prompt, more in shape]


def shared_by(shape: list[tuple[int, int]]) -> SharedPrompts:
    groups = [prompt for prompt, _ in shape]
    return SharedPrompts(bounds_of(shape), [PROMPT_LENGTHS[prompt] for prompt in groups], groups, CPU)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), min_size=1, max_size=9))
def test_every_token_has_the_row_of_its_own_kind_and_no_token_runs_twice(shape):
    """The row's token is the same, at the same place of its sequence, behind the same tokens."""
    shared, bounds = shared_by(shape), bounds_of(shape)
    packed = torch.cat(sequences_of(shape))
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(bounds)])
    assert torch.equal(packed[shared.tokens[shared.rows]], packed)
    assert torch.equal(positions[shared.tokens[shared.rows]], positions)
    prompts = {prompt for prompt, _ in shape}
    assert len(shared.tokens) == sum(PROMPT_LENGTHS[prompt] for prompt in prompts) + sum(more for _, more in shape)
    assert shared.tokens.unique().numel() == len(shared.tokens)


def options_of(case: str) -> AttentionOptions:
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    return {
        "plain": AttentionOptions(0.3),
        "window": AttentionOptions(0.3, window=5),
        "wide window": AttentionOptions(0.3, window=50),
        "softcap": AttentionOptions(0.3, softcap=1.5),
        "sinks": AttentionOptions(0.3, sinks=sinks),
        "all": AttentionOptions(0.3, 5, 1.5, sinks),
    }[case]


@pytest.mark.parametrize("value_size", [SIZE, 6])
@pytest.mark.parametrize("case", ["plain", "window", "wide window", "softcap", "sinks", "all"])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_that_of_every_sequence_alone(shape, case, value_size):
    """Values and gradients of q, k and v, each prompt's being the sum over its samples."""
    shape, options = SHAPES[shape], options_of(case)
    shared, bounds = shared_by(shape), bounds_of(shape)
    torch.manual_seed(1)
    heads = [(HEADS, SIZE), (KV_HEADS, SIZE), (KV_HEADS, value_size)]
    inputs = [torch.randn(h, len(shared.tokens), size, dtype=torch.float64, requires_grad=True) for h, size in heads]
    found = SharedPromptsContext(shared, CPU).attend(0, *inputs, options)[shared.rows]
    expected = PackedContext(bounds, CPU).attend(0, *(x[:, shared.rows] for x in inputs), options)
    assert_rounds_to(found, expected)
    upstream = torch.randn_like(found)
    gradients = (torch.autograd.grad(out, inputs, upstream) for out in (found, expected))
    for name, ours, exact in zip("qkv", *gradients, strict=True):
        assert_rounds_to(ours, exact, f"gradient of {name}")


def gradients(model, logits: list[torch.Tensor]) -> list[torch.Tensor]:
    """The sum over all tokens of a fixed function of the logits, and its gradients."""
    total = sum(x.log_softmax(-1)[:, ::7].sum() for x in logits)
    model.zero_grad()
    total.backward()
    return [total.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def run_shared(model, shape: list[tuple[int, int]]) -> list[torch.Tensor]:
    sequences, shared = sequences_of(shape), shared_by(shape)
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    hidden = packed_hidden(model, torch.cat(sequences), positions, bounds_of(shape), shared)
    assert len(hidden) == len(shared.tokens)
    return gradients(model, [lm_head(model).logits(hidden[shared.rows])])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_gives_what_its_own_forward_gives_one_sequence_at_a_time(family):
    model = prepare_model(make_model(family)).train()
    for shape in (SHAPES["side by side"], SHAPES["mixed up, some alone"]):
        native, exact = [
            gradients(plain, [plain(tokens[None], use_cache=False).logits[0] for tokens in sequences_of(shape)])
            for plain in (as_transformers_has_it(make_model(family), dtype) for dtype in (torch.float32, torch.float64))
        ]
        for place, values in enumerate(zip(run_shared(model, shape), native, exact, strict=True)):
            assert_as_exact_as_model(*values, f"{'gradient' if place else 'loss'} {place}")


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_runs_the_same_twice(reentrant):
    model, shape = prepare_model(make_model("qwen3")).train(), SHAPES["side by side"]
    expected = run_shared(model, shape)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert all(map(torch.equal, run_shared(model, shape), expected))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_nan_stays_in_its_sequence(family):
    """And does not reach the samples beside it."""
    model = prepare_model(make_model(family, tie_word_embeddings=False))
    model.get_input_embeddings().weight.data[50] = torch.nan
    shape = SHAPES["side by side"]
    sequences = [s.clamp_max(49) for s in sequences_of(shape)]
    sequences[1][-2] = 50
    shared = shared_by(shape)
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    hidden = packed_hidden(model, torch.cat(sequences), positions, bounds_of(shape), shared)[shared.rows]
    start, end = bounds_of(shape)[1:3]
    assert hidden[end - 2 : end].isnan().all()
    assert hidden[:start].isfinite().all() and hidden[end:].isfinite().all()


def test_a_rollout_knows_equal_prompts_whoever_asked_for_them():
    """Two samples of each, and one prompt twice in the call; those of other lengths and other tokens are others."""
    model = prepare_model(make_model("llama"))
    rollout = Engine(model).generate(
        [[5, 6, 7], [5, 6], [5, 6, 7], [5, 6, 8]], SamplingParams(n=2, max_new_tokens=4, ignore_eos=True)
    )
    assert rollout.prompt_groups == [0, 0, 1, 1, 0, 0, 2, 2]
    assert rollout.shared_prompts.tokens.numel() == 3 + 2 + 3 + 8 * 4
    assert rollout.select([0, 2, 6]).shared_prompts is None
    part = rollout.select([4, 1, 2])
    assert part.shared_prompts.tokens.numel() == 3 + 2 + 3 * 4 and part.prompt_lengths == [3, 3, 2]
