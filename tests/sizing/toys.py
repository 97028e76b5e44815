"""Setups of toy models and of real models' sizes, on devices of round numbers."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel

from fastppo import PPOConfig
from fastppo.sizing import Device, ModelShape, Networks, Setup, device_named, shape_of

LLAMA_8B = {  # Llama 3.1 8B's configuration
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
CPU = Device("cpu", 1e12, 1e10, 1e11, 1e11, 1e10, node=1024)


def outline(kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return kind(config)


@cache
def llama_8b() -> ModelShape:
    """In bfloat16."""
    return shape_of(outline(LlamaForCausalLM, LlamaConfig(**LLAMA_8B)), torch.bfloat16, None)


def setup_on(
    gpu: str | Device, policy: ModelShape, dtype=torch.bfloat16, prompt=512, ranks=1, sharding="none", **sections
) -> Setup:
    """sections: settings of each, as PPOConfig takes them."""
    device = device_named(gpu) if isinstance(gpu, str) else gpu
    networks = Networks(policy, None)
    return Setup(PPOConfig(**sections), networks, device, dtype, prompt, ranks, sharding, network=50e9)


def setup_of_row(row, dtype=torch.float32) -> Setup:
    """What `fastppo.bench.step_memory` measures."""
    rollout = replace(
        row.config.rollout, prompts_per_step=row.prompts, max_new_tokens=row.new_tokens, batch_size=row.prompts
    )
    with torch.device("meta"):
        networks = Networks(shape_of(row.model(), dtype, None), None)
    return Setup(replace(row.config, rollout=rollout), networks, CPU, dtype, prompt=8)
