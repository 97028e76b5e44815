"""Tiny random models of many architectures, and one whose every next token is known."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fastppo.rollout import Rollout
from tests.tolerance import assert_as_exact_as_model

VOCAB_SIZE, CONTEXT, WINDOW = 96, 64, 8

COMMON = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=CONTEXT,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
    attention_dropout=0.1,
)
GROUPED = COMMON | dict(num_key_value_heads=2, head_dim=8)
EXPERTS = GROUPED | dict(num_experts_per_tok=2, moe_intermediate_size=16, num_experts=4, num_local_experts=4)
GPT2 = dict(
    vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, eos_token_id=None, bos_token_id=None
)

FAMILIES: dict[str, tuple[str, Mapping[str, object]]] = {
    "llama": ("llama", GROUPED),
    "mistral-window": ("mistral", GROUPED | dict(sliding_window=WINDOW)),
    "mixtral": ("mixtral", EXPERTS | dict(sliding_window=WINDOW, router_jitter_noise=0.3)),
    "qwen2": ("qwen2", COMMON | dict(num_key_value_heads=2)),
    "qwen3": ("qwen3", GROUPED),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "gemma2": ("gemma2", GROUPED | dict(sliding_window=WINDOW, query_pre_attn_scalar=8, final_logit_softcapping=3.0)),
    "gemma3": ("gemma3_text", GROUPED | dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])),
    "gpt2": ("gpt2", GPT2),
    "gpt_neox": ("gpt_neox", COMMON),
    "opt": ("opt", COMMON | dict(ffn_dim=48, word_embed_proj_dim=24, do_layer_norm_before=True)),
    "phi": ("phi", COMMON | dict(num_key_value_heads=2)),
    "phi3": ("phi3", COMMON | dict(num_key_value_heads=2, sliding_window=WINDOW)),
    "olmo2": ("olmo2", COMMON | dict(num_key_value_heads=2)),
    "granite": ("granite", COMMON | dict(num_key_value_heads=2, logits_scaling=4.0, attention_multiplier=0.2)),
    "cohere": ("cohere", COMMON | dict(num_key_value_heads=2, logit_scale=0.25)),
    "cohere2": ("cohere2", GROUPED | dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])),
    "starcoder2": ("starcoder2", COMMON | dict(num_key_value_heads=2, sliding_window=WINDOW)),
    "gpt_oss": ("gpt_oss", EXPERTS | dict(sliding_window=WINDOW)),
    "deepseek_v3": (
        "deepseek_v3",
        COMMON | dict(
            num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16,
            first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12,
        ),
    ),
}  # fmt: skip


def make_model(family: str, *, dtype: torch.dtype = torch.float32, **overrides: object) -> PreTrainedModel:
    """A model of the family with weights large enough that every layer matters; the same at every call."""
    name, settings = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **{**settings, **overrides}), dtype=torch.float32
    )
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 or name.endswith(("bias", "sinks")):
            torch.nn.init.normal_(parameter, std=1.0 if name.endswith("sinks") else 0.25)
    return model.to(dtype).eval()


def as_transformers_has_it(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy on the CPU that runs its own forward, in the attention that has every model's soft-capping and sinks."""
    plain = copy.deepcopy(model).to("cpu", dtype)
    plain.set_attn_implementation("eager")
    if hasattr(plain, "set_experts_implementation"):
        plain.set_experts_implementation("eager")  # the grouped product has no fp64
    return plain


@torch.no_grad()
def own_logits(model: PreTrainedModel, sequences: list[list[int]], dtype: torch.dtype) -> Tensor:
    """[tokens, V] of Transformers' forward in `dtype`, one sequence at a time."""
    plain = as_transformers_has_it(model, dtype)
    return torch.cat([plain(torch.tensor([tokens]), use_cache=False).logits[0] for tokens in sequences])


def assert_logprobs_are_the_models(rollout: Rollout, model: PreTrainedModel, temperature: float = 1.0) -> None:
    """By the one error rule, against the log-probabilities of the same tokens in fp64."""
    tokens, bounds = rollout.tokens.cpu(), rollout.cu_seqlens.tolist()
    sequences = [tokens[first:end].tolist() for first, end in pairwise(bounds)]
    actions = rollout.action_mask.nonzero().squeeze(1).cpu()

    def logprobs(dtype: torch.dtype) -> Tensor:
        logits = own_logits(model, sequences, dtype)[actions - 1] / temperature
        return logits.log_softmax(-1).gather(1, tokens[actions, None]).squeeze(1)

    ours = rollout.logprobs.cpu()
    assert_as_exact_as_model(ours, logprobs(torch.float32), logprobs(torch.float64), "log-probabilities")


def make_chain(successors: list[int], *, gap: float = 6.0) -> PreTrainedModel:
    """A Llama in which successors[token] follows each token, `gap` nats ahead of all others, whatever came before."""
    size = len(successors)
    hidden_size = size + size % 2  # rotary embeddings want an even number
    config = LlamaConfig(
        vocab_size=size, hidden_size=hidden_size, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=CONTEXT, pad_token_id=None, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, hidden_size))
        model.lm_head.weight.zero_()
        # The final norm scales a unit vector to length sqrt(hidden_size).
        model.lm_head.weight[successors, range(size)] = gap / hidden_size**0.5
    return model


def ragged_prompts(lengths: tuple[int, ...] = (3, 17, 1, 9, 12), vocab_size: int = VOCAB_SIZE) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, vocab_size, (n,), generator=generator).tolist() for n in lengths]
