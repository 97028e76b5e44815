"""Two engines, two threads, one model: each call has it for itself, and leaves it as it was."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastppo.rollout import Engine, SamplingParams
from tests.rollout.tiny import make_model, ragged_prompts

SAMPLING = SamplingParams(n=2, max_new_tokens=12, seed=5)


@pytest.mark.parametrize("shared", ["model", "engine"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_threads_get_what_each_would_get_alone(family, shared):
    """Without a lock: KeyError 'forward', other numerics, and the results of one in the cache of the other."""
    model = make_model(family).train()
    engines = [Engine(model, keep_cache=True)] * 4 if shared == "engine" else [Engine(model) for _ in range(4)]
    expected = engines[0].generate(ragged_prompts(), SAMPLING)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda engine: engine.generate(ragged_prompts(), SAMPLING), engines * 3))
    for rollout in found:
        assert torch.equal(rollout.tokens, expected.tokens) and torch.equal(rollout.logprobs, expected.logprobs)
    assert all(module.training for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_call_within_a_call_is_refused_and_the_model_goes_on():
    engine = Engine(make_model("llama"))
    with pytest.raises(RuntimeError, match="this thread is sampling from the same model already"):
        engine.generate([[1, 2]], SAMPLING, on_tokens=lambda _: Engine(engine.model).generate([[3]], SAMPLING))
    assert engine.generate([[1, 2]], SAMPLING).num_sequences == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_default_type_that_somebody_sets_changes_nothing(dtype):
    """Transformers sets it while it loads a model, for all threads: halved buffers under the decoder's kernels corrupted the heap."""
    engine = Engine(make_model("llama"), keep_cache=True)
    expected = engine.generate(ragged_prompts(), SAMPLING)
    torch.set_default_dtype(dtype)
    try:
        found = engine.generate(ragged_prompts(), SAMPLING)
        fresh = Engine(engine.model).generate(ragged_prompts(), SAMPLING)
    finally:
        torch.set_default_dtype(torch.float32)
    for rollout in (found, fresh):
        assert torch.equal(rollout.tokens, expected.tokens) and torch.equal(rollout.logprobs, expected.logprobs)
