"""Models: the check before use, packed training forwards, heads, critics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutput

from fastppo.model import (
    Critic,
    ValueHead,
    context_length,
    lm_head,
    packed_hidden,
    prepare_model,
)
from fastppo.rollout import Engine
from tests.rollout.tiny import CONTEXT, FAMILIES, VOCAB_SIZE, WINDOW, as_transformers_has_it, make_chain, make_model
from tests.tolerance import assert_as_exact_as_model


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _pack(sequences: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens, position_ids, cu_seqlens"""
    bounds = torch.tensor([0, *map(len, sequences)]).cumsum(0).int()
    return torch.cat(sequences), torch.cat([torch.arange(len(s)) for s in sequences]), bounds


def _sequences(*lengths: int) -> list[torch.Tensor]:
    return [torch.randint(1, VOCAB_SIZE, (length,)) for length in lengths]


class TestPackedTraining:
    """Packing changes neither values nor gradients but for roundings."""

    families = ["llama", "qwen3", "mistral-window", "gemma2", "gpt_oss", "gpt2", "phi", "mixtral"]
    lengths = (5, 33, 1, 12, 12)

    @staticmethod
    def _gradients(model, logits: list[torch.Tensor]) -> list[torch.Tensor]:
        """The sum over all tokens of a fixed function of the logits, and its gradients."""
        total = sum(x.log_softmax(-1)[:, ::7].sum() for x in logits)
        model.zero_grad()
        total.backward()
        return [total.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    def _packed(self, model, *groups: list[torch.Tensor]) -> list[torch.Tensor]:
        return self._gradients(model, [lm_head(model).logits(packed_hidden(model, *_pack(group))) for group in groups])

    def _alone(self, family: str, dtype: torch.dtype, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
        """By Transformers' own forward."""
        model = as_transformers_has_it(make_model(family), dtype)
        return self._gradients(model, [model(tokens[None], use_cache=False).logits[0] for tokens in sequences])

    @pytest.mark.parametrize("family", families)
    def test_whatever_the_packing_it_equals_the_own_forward_one_at_a_time(self, family):
        model, sequences = prepare_model(make_model(family)).train(), _sequences(*self.lengths)
        native, exact = (self._alone(family, dtype, sequences) for dtype in (torch.float32, torch.float64))
        for groups in ([sequences], [sequences[::-1]], [sequences[:2], sequences[2:]], [[s] for s in sequences]):
            found = self._packed(model, *groups)
            for place, values in enumerate(zip(found, native, exact, strict=True)):
                assert_as_exact_as_model(*values, f"{'gradient' if place else 'loss'} {place} of {len(groups)} groups")

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing(self, reentrant):
        """The same work twice."""
        model = prepare_model(make_model("qwen3")).train()
        sequences = _sequences(*self.lengths)
        expected = self._packed(model, sequences)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert all(map(torch.equal, self._packed(model, sequences), expected))

    def test_nan_stays_in_its_sequence(self):
        model = prepare_model(make_model("llama", tie_word_embeddings=False))
        model.get_input_embeddings().weight.data[50] = torch.nan
        good, bad = _sequences(5)[0].clamp_max(49), torch.tensor([1, 50, 2])
        hidden = packed_hidden(model, *_pack([bad, good, bad, good]))
        assert hidden[3:8].isfinite().all() and hidden[11:].isfinite().all() and hidden[1:3].isnan().all()

    @pytest.mark.parametrize(
        "change, message",
        [
            (dict(tokens=torch.ones(5, dtype=torch.int64)), r"tokens and position_ids have shapes \[5\] and \[6\]"),
            (dict(tokens=torch.ones(0, dtype=torch.int64), position_ids=torch.arange(0)), "T >= 1"),
            (dict(cu_seqlens=torch.tensor([0, 4, 5])), "cu_seqlens is"),
            (dict(cu_seqlens=torch.tensor([0, 5, 4, 6])), "cu_seqlens is"),
            (dict(cu_seqlens=torch.tensor([1, 6])), "cu_seqlens is"),
        ],
    )
    def test_errors(self, change, message):
        arguments = dict(
            tokens=torch.ones(6, dtype=torch.int64), position_ids=torch.arange(6), cu_seqlens=torch.tensor([0, 6])
        )
        with pytest.raises(ValueError, match=message):
            packed_hidden(prepare_model(make_chain([0, 0])), **(arguments | change))

    def test_sequence_beyond_the_context(self):
        model = prepare_model(make_chain([0, 0]))
        tokens, positions, bounds = _pack(
            [torch.ones(3, dtype=torch.int64), torch.ones(CONTEXT + 1, dtype=torch.int64)]
        )
        with pytest.raises(ValueError, match=f"sequence 1 has {CONTEXT + 1} tokens, expected at most {CONTEXT}"):
            packed_hidden(model, tokens, positions, bounds)

    def test_unprepared_model(self):
        with pytest.raises(ValueError, match="LlamaForCausalLM has attention implementation 'sdpa'.*prepare_model"):
            packed_hidden(make_chain([0, 0]), *_pack([torch.ones(3, dtype=torch.int64)]))


class TestPrepare:
    def test_returns_the_same_model_in_the_same_mode(self):
        model = make_model("llama").train()
        model.model.norm.eval()
        assert prepare_model(model) is model and prepare_model(model) is model
        assert model.training and not model.model.norm.training

    def test_switches_dropout_and_noise_off(self):
        for family in ("gpt2", "opt", "mixtral", "llama"):
            model = prepare_model(make_model(family)).train()
            assert all(module.p == 0 for module in model.modules() if isinstance(module, nn.Dropout))
            arguments = _pack(_sequences(9, 4))
            assert torch.equal(packed_hidden(model, *arguments), packed_hidden(model.eval(), *arguments))

    def test_leaves_random_state_alone(self):
        model = make_model("llama")
        state = torch.get_rng_state()
        prepare_model(model)
        assert torch.equal(torch.get_rng_state(), state)

    def test_copies_are_prepared(self):
        model = prepare_model(make_model("llama"))
        arguments = _pack(_sequences(9, 4))
        assert torch.equal(packed_hidden(copy.deepcopy(model), *arguments), packed_hidden(model, *arguments))

    def test_a_saved_model_is_plain_again(self, tmp_path):
        model = prepare_model(make_model("llama"))
        model.save_pretrained(tmp_path)
        assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"

    @pytest.mark.parametrize("family", [*FAMILIES, "gemma3 with pictures", "llava"])
    def test_leaves_all_that_is_saved_of_a_config_as_it_came(self, family, tmp_path):
        """Dropout and attention, in the text part of a nested configuration too."""
        model = make_nested(family) if family in NESTED else make_model(family)
        for config in (model.config, model.config.get_text_config()):
            for name in vars(config):
                if "dropout" in name or "pdrop" in name:
                    setattr(config, name, 0.125)
        model.save_pretrained(tmp_path / "came")
        prepare_model(model).save_pretrained(tmp_path / "went")
        came, went = ((tmp_path / name / "config.json").read_text() for name in ("came", "went"))
        assert came == went
        assert "0.125" in went and "fastppo" not in went

    def test_noise_that_layers_read_in_the_config_is_off(self):
        """Persimmon asks its configuration for the attention's dropout at each call."""
        config = AutoConfig.for_model("persimmon", **WIDE | dict(attention_dropout=0.5, hidden_dropout=0.5))
        model = prepare_model(AutoModelForCausalLM.from_config(config)).train()
        arguments = _pack(_sequences(9, 4))
        assert torch.equal(packed_hidden(model, *arguments), packed_hidden(model.eval(), *arguments))

    def test_direct_calls_say_what_to_do(self):
        model = prepare_model(make_model("llama"))
        with pytest.raises(ValueError, match=r"model.set_attn_implementation\('sdpa'\)"):
            model(torch.tensor([[1, 2]]))
        model.set_attn_implementation("sdpa")
        assert model(torch.tensor([[1, 2]])).logits.isfinite().all()

    def test_gradient_checkpointing_may_be_on(self):
        model = make_model("llama")
        model.gradient_checkpointing_enable()
        prepare_model(model.train())

    def test_only_models(self):
        with pytest.raises(TypeError, match="model is Linear, expected a transformers.PreTrainedModel"):
            prepare_model(nn.Linear(2, 2))


SMALL = dict(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, eos_token_id=None)
WIDE = SMALL | dict(intermediate_size=48, num_key_value_heads=2, max_position_embeddings=CONTEXT, head_dim=8)
EXPERTS = WIDE | dict(num_local_experts=4, num_experts_per_tok=2, attention_dropout=0.1)
REFUSED = {
    "bloom": ("bloom", SMALL, "attention interface"),
    "falcon": ("falcon", SMALL, "attention interface"),
    "gptj": ("gptj", dict(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, resid_pdrop=0.1), "attention interface"),
    "mamba": ("mamba", SMALL | dict(state_size=4), "recurrent state"),
    "conv": ("lfm2", WIDE | dict(layer_types=["conv", "full_attention"]), "layers of type (conv|linear_attention)"),
    "linear": ("qwen3_next", WIDE | dict(num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=8,
               linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8), "recurrent state"),
    "chunked": ("llama4_text", EXPERTS | dict(intermediate_size_mlp=48), "chunked_attention"),
    "stablelm": ("stablelm", WIDE | dict(hidden_dropout=0.1), "drops keyword arguments|attention interface"),
    "nemotron": ("nemotron", WIDE, "drops keyword arguments|attention interface"),
    "own-mask": ("doge", WIDE, "a mask|an attention mask"),
    "window-unused": ("phimoe", EXPERTS | dict(sliding_window=WINDOW), "window None, expected 8"),
    "layers-before-the-head": ("bert", SMALL | dict(intermediate_size=48), r"cls \(BertOnlyMLMHead\) stands between"),
    "odd-head": ("hyperclovax", WIDE | dict(logits_scaling=3.0), "differ from its own forward"),
}  # fmt: skip


class TestRefused:
    @pytest.mark.parametrize("case", REFUSED)
    def test_names_architecture_and_reason_and_leaves_the_model_alone(self, case):
        name, settings, reason = REFUSED[case]
        if name not in CONFIG_MAPPING:
            pytest.skip(f"this Transformers has no {name}")
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings)).train()
        before = (model.config._attn_implementation, repr(model), copy.deepcopy(vars(model.config)))
        with pytest.raises(ValueError, match=f"^{type(model).__name__} is not supported: .*({reason})"):
            prepare_model(model)
        assert (model.config._attn_implementation, repr(model), vars(model.config)) == before
        assert all(module.training for module in model.modules())

    def test_by_the_engine_too(self):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **SMALL))
        with pytest.raises(ValueError, match="BloomForCausalLM is not supported"):
            Engine(model)

    def test_encoder_decoder(self):
        config = T5Config(vocab_size=VOCAB_SIZE, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        with pytest.raises(ValueError, match="T5ForConditionalGeneration is not supported: encoder-decoder"):
            prepare_model(T5ForConditionalGeneration(config))

    def test_model_without_head(self):
        with pytest.raises(ValueError, match="LlamaModel is not supported: LlamaModel has no language-model head"):
            prepare_model(make_model("llama").model)

    def test_broken_weights(self):
        model = make_model("llama")
        model.model.norm.weight.data[0] = torch.nan
        with pytest.raises(ValueError, match="its own logits hold NaN"):
            prepare_model(model)


NESTED = {
    "gemma3 with pictures": (Gemma3ForConditionalGeneration, Gemma3Config, "gemma3"),
    "llava": (LlavaForConditionalGeneration, LlavaConfig, "llama"),
}


def make_nested(name: str):
    """A model whose language part has a configuration inside another one."""
    model_class, config_class, family = NESTED[name]
    kind, settings = FAMILIES[family]
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    extra = {} if family == "llama" else dict(mm_tokens_per_image=4)
    config = config_class(
        text_config=dict(model_type=kind) | settings, vision_config=dict(model_type="siglip_vision_model") | vision, **extra
    )  # fmt: skip
    return model_class(config).eval()


class LinearWithLora(nn.Module):
    """As PEFT wraps a layer: the second factor begins at zero, so the logits are the same at the start."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class ScaledLinear(nn.Linear):
    """As (IA)3 scales a layer's outputs, by one at the start."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__(base_layer.in_features, base_layer.out_features, bias=False)
        self.weight, self.scale = base_layer.weight, nn.Parameter(torch.ones(base_layer.out_features))

    def forward(self, x):
        return super().forward(x) * self.scale


class LlamaWithMore(LlamaForCausalLM):
    """A layer before its head that adds nothing yet."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.more = nn.Linear(config.hidden_size, config.hidden_size)
        nn.init.zeros_(self.more.weight)
        nn.init.zeros_(self.more.bias)

    def forward(self, input_ids, **kwargs):
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(hidden + self.more(hidden)))


def _set_head(wrap):
    return lambda model: model.set_output_embeddings(wrap(model.get_output_embeddings()))


def _with_forward(part):
    def change(model):
        module = part(model)
        forward = module.forward
        module.forward = lambda *args, **kwargs: forward(*args, **kwargs)

    return change


def _head(model):
    return model.lm_head


class TestWhatWouldBePassedOver:
    """Anything besides a plain linear head stands between trunk and logits, even if it changes no number yet."""

    changes = {
        "LoRA": (_set_head(LinearWithLora), "output head lm_head is LinearWithLora, expected a plain torch.nn.Linear"),
        "scaled": (_set_head(ScaledLinear), "output head lm_head is ScaledLinear"),
        "sequence": (_set_head(nn.Sequential), "output head lm_head is Sequential|no language-model head"),
        "parametrized": (lambda m: weight_norm(m.lm_head), "output head lm_head is ParametrizedLinear"),
        "hook on the head": (lambda m: m.lm_head.register_forward_hook(lambda *_: None), "its output head has hooks"),
        "pre-hook on the head": (lambda m: m.lm_head.register_forward_pre_hook(lambda *_: None), "its output head has"),
        "forward of the head": (_with_forward(_head), "its output head has hooks or a forward of its own"),
        "hook on the model": (lambda m: m.register_forward_hook(lambda *_: None), "it has hooks or a forward of its own"),
        "forward of the model": (_with_forward(lambda m: m), "it has hooks or a forward of its own"),
    }  # fmt: skip

    @pytest.mark.parametrize("case", changes)
    def test_is_refused_by_name(self, case):
        change, reason = self.changes[case]
        model = make_model("llama", tie_word_embeddings=False)
        change(model)
        before = (model.config._attn_implementation, repr(model))
        with pytest.raises(ValueError, match=f"^LlamaForCausalLM is not supported: .*({reason})"):
            prepare_model(model)
        assert (model.config._attn_implementation, repr(model)) == before

    def test_a_layer_before_the_head_that_does_nothing_yet(self):
        model = LlamaWithMore(make_model("llama").config)
        with pytest.raises(ValueError, match=r"LlamaWithMore is not supported: more \(Linear\) stands between"):
            prepare_model(model)
        assert not model.more._forward_pre_hooks

    @pytest.mark.parametrize("wrap", [LinearWithLora, ScaledLinear])
    def test_an_adapter_that_comes_later(self, wrap):
        model = prepare_model(make_model("llama", tie_word_embeddings=False))
        _set_head(wrap)(model)
        with pytest.raises(ValueError, match=f"output head lm_head is {wrap.__name__}"):
            Engine(model)

    def test_what_does_not_stand_between_is_left_alone(self):
        """A value head of somebody's, adapters inside the trunk, a bias."""
        model = make_model("llama", tie_word_embeddings=False)
        model.v_head = nn.Linear(32, 1)
        model.model.layers[0].mlp.up_proj = LinearWithLora(model.model.layers[0].mlp.up_proj)
        model.lm_head.bias = nn.Parameter(torch.randn(VOCAB_SIZE))
        prepare_model(model)


class TestHead:
    def test_views_are_live(self):
        model = make_model("llama", tie_word_embeddings=True)
        head = lm_head(model)
        assert head.weight is model.get_input_embeddings().weight
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(1)
        assert torch.equal(lm_head(model).weight, head.weight)
        assert head[1:] == (None, None, 1.0, False)

    @pytest.mark.parametrize(
        "family, softcap, scale",
        [("gemma2", 3.0, 1.0), ("cohere", None, 0.25), ("granite", None, 0.25), ("phi", None, 1.0)],
    )
    def test_options(self, family, softcap, scale):
        head = lm_head(make_model(family))
        assert (head.softcap, head.logit_scale) == (softcap, scale)
        assert (head.bias is not None) == (family == "phi")


def test_context_length():
    assert context_length(make_model("llama")) == CONTEXT
    factors = [1.0] * 4
    rope = dict(
        rope_type="longrope",
        short_factor=factors,
        long_factor=factors,
        original_max_position_embeddings=16,
        rope_theta=1e4,
    )
    assert context_length(make_model("phi3", rope_parameters=rope, original_max_position_embeddings=16)) == 16


class TestCritic:
    def test_starts_at_zero_from_a_copy_of_the_trunk(self):
        model = prepare_model(make_model("qwen2"))
        critic, arguments = Critic.from_model(model), _pack(_sequences(4, 7))
        values = critic(*arguments)
        assert values.shape == (11,) and values.dtype == torch.float32 and not values.any()
        assert torch.equal(packed_hidden(critic.trunk, *arguments), packed_hidden(model, *arguments))
        shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in critic.parameters()}
        assert not shared

    def test_values_and_gradients_do_not_depend_on_packing(self):
        critic = Critic.from_model(prepare_model(make_model("llama")))
        nn.init.normal_(critic.head.weight)
        sequences = _sequences(4, 7, 1)
        packed = critic(*_pack(sequences))
        copies = critic, copy.deepcopy(critic).double()
        native, exact = (torch.cat([one(*_pack([s])) for s in sequences]).detach() for one in copies)
        assert_as_exact_as_model(packed.detach(), native, exact)
        packed.sum().backward()
        assert all(p.grad is not None for p in critic.parameters())

    def test_fp32_head_on_a_bf16_trunk(self):
        model = prepare_model(make_model("qwen2", dtype=torch.bfloat16))
        critic = Critic.from_model(model)
        assert critic.head.weight.dtype == torch.float32
        assert critic(*_pack(_sequences(4, 7))).dtype == torch.float32
        assert ValueHead(32)(torch.randn(3, 32, dtype=torch.float16)).dtype == torch.float32

    def test_needs_a_prepared_model(self):
        with pytest.raises(ValueError, match="prepare_model"):
            Critic.from_model(make_model("llama"))
