"""Buckets, buffers and lifetime of captured decode steps. Where there is no GPU, a replay runs the step again on the same buffers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastppo.rollout import Engine, SamplingParams, model_runner
from fastppo.rollout.decoder import ModuleDecoder
from fastppo.rollout.graphs import Captured, GraphDecoder, bucket
from fastppo.rollout.model_runner import ModelRunner
from tests.rollout.tiny import assert_logprobs_are_the_models, make_model, ragged_prompts

SAMPLING = SamplingParams(n=3, max_new_tokens=20, seed=5)


class Recorder:
    """Counts captures; a capture runs once and then keeps its outputs' place, as a graph does."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, run, pool) -> Captured:
        hidden = run().clone()
        assert pool == ("pool" if self.sizes else None), "the graphs of a decoder share their memory"
        self.sizes.append(len(hidden))
        return Captured(lambda: hidden.copy_(run()), hidden, "pool")


def with_graphs(monkeypatch, capture) -> list[GraphDecoder]:
    """All engines replay; the decoders that they made."""
    made: list[GraphDecoder] = []

    def make(runner, cache, *, rows, positions):
        decoder = ModuleDecoder(runner.model, cache)
        parameters, device = list(runner.model.parameters()), runner.model.device
        made.append(GraphDecoder(decoder, parameters, cache, rows=rows, blocks=2, device=device, capture=capture))
        return made[-1]

    monkeypatch.setattr(ModelRunner, "_decoder", make)
    return made


def test_buckets():
    assert [bucket(rows) for rows in (1, 2, 3, 4, 5, 7, 9, 13, 24, 25, 33, 49, 100, 129)] == [
        1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 192,
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2", "gpt2"])
@pytest.mark.parametrize("max_batch_size", [1, 5, 16])
def test_replays_sample_what_the_modules_sample(family, max_batch_size, monkeypatch):
    """Ragged prompts, refilled rows, shared prompts; rows that fill up a bucket touch nobody's keys."""
    model = make_model(family)
    expected = Engine(model, max_batch_size=max_batch_size).generate(ragged_prompts(), SAMPLING)
    recorder = Recorder()
    with_graphs(monkeypatch, recorder)
    found = Engine(model, max_batch_size=max_batch_size).generate(ragged_prompts(), SAMPLING)
    assert torch.equal(found.tokens, expected.tokens)
    assert_logprobs_are_the_models(found, model)
    assert len(set(recorder.sizes)) == len(recorder.sizes), "each bucket once"
    assert max(recorder.sizes) == bucket(min(max_batch_size, 15))


def test_a_step_that_cannot_be_captured_runs_as_it_is(monkeypatch):
    def refuse(run, pool):
        raise RuntimeError("operation not permitted when stream is capturing")

    model = make_model("llama")
    expected = Engine(model).generate(ragged_prompts(), SAMPLING)
    with_graphs(monkeypatch, refuse)
    assert torch.equal(Engine(model).generate(ragged_prompts(), SAMPLING).tokens, expected.tokens)


def test_memory_that_runs_out_in_a_capture_is_not_passed_over(monkeypatch):
    """It would be found again, by a step without graphs, or later in training where nothing points here."""

    def exhaust(run, pool):
        raise torch.OutOfMemoryError("no memory left for a graph")

    def exhaust_and_end(run, pool):
        try:
            exhaust(run, pool)
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def exhaust_in_the_driver(run, pool):
        raise RuntimeError("CUDA error: out of memory")

    for capture in (exhaust, exhaust_and_end, exhaust_in_the_driver):
        with_graphs(monkeypatch, capture)
        with pytest.raises(RuntimeError, match="memory|during capture"):
            Engine(make_model("llama")).generate(ragged_prompts(), SAMPLING)


def test_steps_of_alternating_calls_are_captured_once(monkeypatch):
    """A trainer's rollouts and evaluations: many short sequences, then a few long ones, on a cache and graphs that stay."""
    recorders, model = [], make_model("llama", max_position_embeddings=128)

    class Recorded(GraphDecoder):
        def __init__(self, *args, **options) -> None:
            recorders.append(Recorder())
            super().__init__(*args, **options, capture=recorders[-1])

    monkeypatch.setattr(model_runner, "GRAPHED", ("cpu",))
    monkeypatch.setattr(model_runner, "GraphDecoder", Recorded)
    engine, expected = Engine(model, max_batch_size=16, keep_cache=True), Engine(model, max_batch_size=16)

    def both(prompts, new_tokens):
        sampling = SamplingParams(max_new_tokens=new_tokens, seed=5)
        found = engine.generate(prompts, sampling)
        with monkeypatch.context() as patch:
            patch.setattr(model_runner, "GRAPHED", ())
            assert torch.equal(found.tokens, expected.generate(prompts, sampling).tokens)

    many, few = [[2, 3]] * 12, [list(range(2, 32))]
    for _ in range(2):
        both(many, 4)
        both(few, 60)
        both(many, 4)
    graphs, sizes = engine.runner.kept_graphs, [list(recorder.sizes) for recorder in recorders]
    both(few, 60)
    both(many, 4)
    assert engine.runner.kept_graphs is graphs and [recorder.sizes for recorder in recorders] == sizes


def test_graphs_outlast_updates_in_place_and_nothing_else(monkeypatch):
    model = make_model("llama")
    made = with_graphs(monkeypatch, Recorder())
    Engine(model, max_batch_size=4).generate(ragged_prompts(), SAMPLING)
    graphs, cache = made[0], made[0]._cache

    def serves(cache=cache, rows=4, blocks=2):
        return graphs.serves(list(model.parameters()), cache, rows=rows, blocks=blocks)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert serves() and serves(rows=1, blocks=1)
    assert not serves(rows=5) and not serves(blocks=3) and not serves(cache=None)
    model.model.norm.weight = nn.Parameter(torch.ones_like(model.model.norm.weight))
    assert not serves()
