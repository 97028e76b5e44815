"""Every supported architecture: what the engine does equals what Transformers does with one prompt at a time."""

from __future__ import annotations

import copy

import pytest
import torch

from fastppo.model import lm_head, packed_hidden, prepare_model
from fastppo.rollout import Engine, SamplingParams
from tests.rollout.tiny import FAMILIES, assert_logprobs_are_the_models, make_model, own_logits, ragged_prompts
from tests.tolerance import assert_as_exact_as_model


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    """(prepared model, untouched copy in eager attention, which has every model's soft-capping and sinks)"""
    model = make_model(request.param)
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    return prepare_model(model), plain


def _generate_alone(model, prompt: list[int], new_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens)
    return out[0, len(prompt) :].tolist()


def test_greedy_equals_single_prompt_generate(pair):
    """Ragged prompts, two slots for five prompts: rows finish and are refilled."""
    model, plain = pair
    prompts = ragged_prompts()
    rollout = Engine(model, max_batch_size=2).generate(prompts, SamplingParams(temperature=0, max_new_tokens=12))
    assert rollout.completions() == [_generate_alone(plain, prompt, 12) for prompt in prompts]
    assert rollout.prompts() == prompts


def test_sampling_logprobs_are_the_models(pair):
    model, _ = pair
    params = SamplingParams(n=2, temperature=0.7, max_new_tokens=10)
    rollout = Engine(model, max_batch_size=4).generate(ragged_prompts(), params)
    assert_logprobs_are_the_models(rollout, model, 0.7)


def test_packed_logits_equal_own_forward(pair):
    model, plain = pair
    prompts = ragged_prompts((5, 21, 1, 12))
    tokens = torch.tensor([token for prompt in prompts for token in prompt])
    positions = torch.tensor([i for prompt in prompts for i in range(len(prompt))])
    bounds = torch.tensor([0, 5, 26, 27, 39], dtype=torch.int32)
    native, exact = (own_logits(plain, prompts, dtype) for dtype in (torch.float32, torch.float64))
    for training in (False, True):  # no dropout, no router noise
        model.train(training)
        found = lm_head(model).logits(packed_hidden(model, tokens, positions, bounds))
        assert_as_exact_as_model(found.detach(), native, exact, f"logits, training={training}")
    model.eval()
