"""LoRA on a base in 4 bits: what its layers compute, what a run writes and goes on from, which settings are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastppo import Engine, SamplingParams
from fastppo.errors import CheckpointError
from fastppo.export import export_run
from fastppo.lora_config import LoRAConfig
from fastppo.model import load_model, prepare_model
from fastppo.model.adapters import add_adapters
from fastppo.model.parts_trunk import trunk_of
from fastppo.run_folder import MODEL
from tests.tiny import make_model, make_tokenizer
from tests.tiny_trainer import build_trainer
from tests.tolerance import assert_as_exact_as_model

pytest.importorskip("peft")
bitsandbytes = pytest.importorskip("bitsandbytes")
SIZES = {"hidden_size": 64, "intermediate_size": 128}
QLORA = {"lora__r": 4, "lora__quantization": "nf4", "critic__kind": "lora", "reward__kl_coef": 0.05}


def quantized(**changes):
    model = make_model(**SIZES | changes)
    adapters = add_adapters(model, LoRAConfig(r=4, quantization="nf4"), seed=0)
    adapters.quantize_base()
    model.set_attn_implementation("sdpa")
    return model, adapters


def in_four_bits(weight: Tensor) -> Tensor:
    codes, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return bitsandbytes.functional.dequantize_4bit(codes, state)


def test_layers_compute_with_the_rounded_weights():
    """Those of every linear layer but the head, at an eighth of the bytes and a little; the model's own modules run."""
    plain, (model, adapters) = make_model(**SIZES), quantized()
    expected = make_model(**SIZES)
    with torch.no_grad():
        for module in expected.model.modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(in_four_bits(module.weight))
    tokens = torch.tensor([[3, 4, 5, 6, 7]])
    got, wanted = model(tokens).logits, expected(tokens).logits
    exact = copy.deepcopy(expected).double()(tokens).logits
    assert_as_exact_as_model(got, wanted, exact)
    assert (got - plain(tokens).logits).abs().max() > 1e-3
    layer = model.model.layers[0].mlp.up_proj.base_layer
    assert layer.weight.nbytes == 64 * 128 // 2 and trunk_of(model) is None
    merged = adapters.merged_state()
    assert merged.keys() == plain.state_dict().keys()
    assert all(torch.equal(merged[name], x) for name, x in expected.state_dict().items())


def test_only_adapters_get_gradients():
    model, _ = quantized()
    model(torch.tensor([[3, 4, 5]])).logits.sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, p in model.named_parameters() if ".lora_" in name
    }


def test_a_pass_without_gradients_leaves_the_weights_as_they_are(monkeypatch):
    """bitsandbytes packs them for processors with AVX512-BF16: scales are rounded to bfloat16, and the products have no gradient from then on."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    model, adapters = quantized()
    tokens, before = torch.tensor([[3, 4, 5]]), adapters.merged_state()
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    expected = torch.autograd.grad(model(inputs_embeds=embedded).logits.sum(), embedded)[0]
    with torch.no_grad():
        model.eval()(tokens)
    found = torch.autograd.grad(model(inputs_embeds=embedded).logits.sum(), embedded)[0]
    assert torch.equal(found, expected)
    assert all(torch.equal(x, before[name]) for name, x in adapters.merged_state().items())


def test_a_run_samples_learns_resumes_and_is_written_at_full_width(tmp_path):
    """Sampling's log-probs are those of training; two runs, one of them in two parts, end in the same bits."""
    source = tmp_path / "source"
    make_model(**SIZES).save_pretrained(source)
    make_tokenizer().save_pretrained(source)

    def trainer(name: str, total_steps: int = 2):
        return build_trainer(tmp_path / name, model=source, total_steps=total_steps, checkpoint__every=1, **QLORA)

    whole = trainer("whole")
    metrics = whole.train()
    assert metrics["rollout/logprob_diff_max"] < 1e-4 and metrics["grad_norm/policy"] > 0
    trainer("parts", total_steps=1).train()
    resumed = trainer("parts")
    resumed.train(resume=True)
    written = [load_file(tmp_path / name / MODEL / "model.safetensors") for name in ("whole", "parts")]
    assert all(torch.equal(x, written[1][name]) for name, x in written[0].items())
    exported = load_file(export_run(tmp_path / "whole", tmp_path / "exported") / "model.safetensors")
    assert all(torch.equal(x, written[0][name]) for name, x in exported.items())
    model = load_model(tmp_path / "whole" / MODEL, dtype="auto", device="cpu")
    base, last = in_four_bits(make_model(**SIZES).model.layers[1].mlp.up_proj.weight), model.model.layers[1].mlp.up_proj
    assert 0 < (last.weight - base).abs().max() < 0.1 and last.weight.dtype == torch.float32
    Engine(model).generate([[3, 4]], SamplingParams(max_new_tokens=2))
    with pytest.raises(CheckpointError, match="lora.quantization is None, was 'nf4'"):
        build_trainer(tmp_path / "parts", model=source, **QLORA | {"lora__quantization": None, "total_steps": 3}).train(
            resume=True
        )


def test_weights_that_learn_are_not_quantised():
    with pytest.raises(ValueError, match="lora.quantization is nf4, expected null with lora.r = 0"):
        LoRAConfig(quantization="nf4")


def test_layers_of_another_kind_are_named():
    model = prepare_model(make_model(**SIZES))
    adapters = add_adapters(model, LoRAConfig(r=2, target_modules=("embed_tokens", "q_proj")), seed=0)
    with pytest.raises(ValueError, match="lora.quantization is nf4, expected null with adapters on Embedding"):
        adapters.quantize_base()
    assert isinstance(model.model.layers[0].self_attn.q_proj.base_layer, nn.Linear)
