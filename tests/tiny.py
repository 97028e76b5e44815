"""A tiny random Llama, a tokenizer of single letters, settings in one line."""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from fastppo import PPOConfig
from fastppo.run_folder import RunFolder

LETTERS = "abcdefghijklmnop"


def ppo_config(**changes) -> PPOConfig:
    """`ppo_config(total_steps=3, critic__lr=1e-3)`: a setting of a section is written section__key."""
    settings: dict = {}
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (settings.setdefault(section, {}) if section else settings)[key] = value
    return PPOConfig(**settings)


def make_tokenizer(letters=LETTERS) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def make_folder(path, settings=None) -> RunFolder:
    """The folder of a run that has begun."""
    folder = RunFolder(path)
    folder.start(settings or {})
    return folder


def _config(**changes) -> LlamaConfig:
    settings = {
        "vocab_size": len(LETTERS) + 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    return LlamaConfig(**settings | changes)


def make_model(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(_config(**changes))


def make_reward_model(seed: int = 0, **changes) -> LlamaForSequenceClassification:
    """With one label; its head is large enough that scores differ."""
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(_config(**{"num_labels": 1} | changes))
    torch.nn.init.normal_(model.score.weight)
    return model
