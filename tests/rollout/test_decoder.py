"""Prompts and decode steps in native calls: which models get them, and that they say what the model's own modules say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastppo.model.parts import LlamaParts, UnlikeLlama
from fastppo.ops import use_backend
from fastppo.rollout import Engine, SamplingParams
from fastppo.rollout.decoder import ModuleDecoder
from fastppo.rollout.model_runner import ModelRunner
from fastppo.rollout.pages import PagedCache
from fastppo.rollout.parts_decoder import parts_decoder
from tests.rollout.tiny import FAMILIES, assert_logprobs_are_the_models, make_model, ragged_prompts

NATIVE = {"llama", "mistral-window", "qwen2", "qwen3", "granite"}
SAMPLING = SamplingParams(n=3, max_new_tokens=30, temperature=1.0, seed=3)


def decoder_of(engine: Engine, monkeypatch) -> type:
    """The class that serves a call."""
    made, make = [], ModelRunner._decoder
    monkeypatch.setattr(ModelRunner, "_decoder", lambda *a, **k: made.append(make(*a, **k)) or made[-1])
    engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=3))
    return type(made[0])


def generate(model, **options):
    return Engine(model, **options).generate(ragged_prompts(), SAMPLING)


@pytest.mark.parametrize("family", FAMILIES)
def test_which_families_are_native(family, monkeypatch):
    native = decoder_of(Engine(make_model(family)), monkeypatch) is not ModuleDecoder
    assert native == (family in NATIVE)


@pytest.mark.parametrize("family", sorted(NATIVE))
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True}, {"head_dim": 20}], ids=str)
def test_samples_as_the_modules_do(family, changes, monkeypatch):
    """The same tokens (shared prompts, refilled rows, windows, biases, heads that fill no vector), log-probabilities up to rounding."""
    model = make_model(family, **changes)
    native = generate(model, max_batch_size=4)
    monkeypatch.setattr("fastppo.rollout.model_runner.parts_agree", lambda *_: False)
    modules = generate(make_model(family, **changes), max_batch_size=4)
    assert torch.equal(native.tokens, modules.tokens)
    for rollout in (native, modules):
        assert_logprobs_are_the_models(rollout, model)


@pytest.mark.parametrize("family", sorted(NATIVE))
@pytest.mark.parametrize("rows", [7, 256])
def test_bits_do_not_depend_on_the_batch(family, rows, monkeypatch):
    """Neither on how many sequences decode side by side nor on how many prompt tokens do, in whose rows a prompt may begin and end anywhere."""
    model = make_model(family)
    expected = generate(model, max_batch_size=16)
    monkeypatch.setattr("fastppo.native.decoder.PREFILL_ROWS", rows)
    for max_batch_size in (1, 3, 16):
        found = generate(model, max_batch_size=max_batch_size)
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.logprobs, expected.logprobs)


@pytest.mark.parametrize("family", sorted(NATIVE))
def test_prompts_have_the_bits_of_steps(family):
    """A prompt over two pages, token by token and all at once."""
    model = make_model(family, max_position_embeddings=128)
    prompt = torch.randint(1, 96, (75,), generator=torch.Generator().manual_seed(1))
    engine = Engine(model)
    seen = engine.runner.look()
    hidden = []
    for at_once in (True, False):
        cache = PagedCache(seen.shapes, 3, model.device)
        modules = ModuleDecoder(model, cache)
        decoder = parts_decoder(LlamaParts(model), modules, cache, seen, rows=1, positions=75)
        if at_once:
            hidden.append(decoder.prefill([prompt.tolist()], [[2, 0]], [0]))
            continue
        for i in range(75):
            last = decoder.step(prompt[i : i + 1], torch.tensor([i + 1]), torch.tensor([[2, 0]], dtype=torch.int32))
        hidden.append(last)
    assert torch.equal(*hidden)


def test_weights_are_read_live():
    model = make_model("qwen3")
    engine = Engine(model)
    before = engine.generate(ragged_prompts(), SAMPLING)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-1)
        model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(
            model.model.layers[0].self_attn.q_proj.weight.flip(0).contiguous()
        )
    after = engine.generate(ragged_prompts(), SAMPLING)
    assert not torch.equal(before.tokens, after.tokens)
    assert torch.equal(after.tokens, generate(model).tokens)


def change_scale(model):
    model.model.layers[1].post_attention_layernorm.register_forward_hook(lambda module, inputs, output: 2 * output)


def change_forward(model):
    own = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: 2 * own(x)


def change_activation(model):
    model.model.layers[1].mlp.act_fn = nn.GELU()


def change_norm(model):
    model.model.norm = nn.LayerNorm(32)


def add_parameter(model):
    model.model.layers[0].mlp.gain = nn.Parameter(torch.ones(1))


def make_sparse(model):
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.t().contiguous().t())


@pytest.mark.parametrize(
    "change", [change_scale, change_forward, change_activation, change_norm, add_parameter, make_sparse]
)
def test_changed_models_run_their_modules(change, monkeypatch):
    model = make_model("llama")
    change(model)
    with pytest.raises(UnlikeLlama):
        LlamaParts(model)
    assert decoder_of(Engine(model), monkeypatch) is ModuleDecoder


@pytest.mark.parametrize("multiplier", ["residual_multiplier", "embedding_multiplier"])
def test_numbers_tell_what_names_do_not(multiplier, monkeypatch):
    """Granite with a multiplier has Llama's modules and another sum."""
    model = make_model("granite", **{multiplier: 0.5})
    LlamaParts(model)
    assert decoder_of(Engine(model), monkeypatch) is ModuleDecoder


class Adapted(nn.Linear):
    """A linear layer with something added, as LoRA puts in place of a plain one."""

    def forward(self, x):
        return super().forward(x) + x.mean(-1, keepdim=True)


def test_adapted_layers_run_their_modules(monkeypatch):
    model = make_model("llama")
    plain = model.model.layers[0].self_attn.q_proj
    adapted = Adapted(plain.in_features, plain.out_features, bias=False)
    adapted.weight = plain.weight
    model.model.layers[0].self_attn.q_proj = adapted
    assert decoder_of(Engine(model), monkeypatch) is ModuleDecoder


def test_other_types_and_backends_run_modules(monkeypatch):
    assert decoder_of(Engine(make_model("llama", dtype=torch.bfloat16)), monkeypatch) is ModuleDecoder
    with use_backend("reference"):
        assert decoder_of(Engine(make_model("llama")), monkeypatch) is ModuleDecoder


def test_rotary_scaling(monkeypatch):
    """Fixed frequencies are native whatever they are; those that follow the batch's longest sequence are not."""
    for rope_type, native in {"linear": True, "llama3": True, "yarn": True, "dynamic": False}.items():
        rope = {"rope_type": rope_type, "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope_type == "llama3" else {}
        made = decoder_of(Engine(make_model("llama", rope_parameters=rope)), monkeypatch)
        assert (made is not ModuleDecoder) == native, rope_type


@pytest.mark.parametrize(
    ("tokens", "lengths", "pages"), [([96], [2], [[0]]), ([1], [65], [[0]]), ([1], [0], [[0]]), ([1], [2], [[4]])]
)
def test_rows_out_of_range_are_named(tokens, lengths, pages, monkeypatch):
    """Before anything is read or written."""
    made, make = [], ModelRunner._decoder
    monkeypatch.setattr(ModelRunner, "_decoder", lambda *a, **k: made.append(make(*a, **k)) or made[-1])
    Engine(make_model("llama")).generate([[1]], SamplingParams(max_new_tokens=3))
    table = torch.tensor(pages, dtype=torch.int32)
    with pytest.raises(ValueError, match="row 0 has token"):
        made[0].step(torch.tensor(tokens), torch.tensor(lengths), table)
