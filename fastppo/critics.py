"""Critics with a trunk of their own: made as the settings say, written to a folder, and read from it again.

A critic's folder is that of a causal language model, whose trunk is the critic's, with `value_head.safetensors` beside it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastppo.critic_config import CriticConfig
from fastppo.model import Critic, Histogram, context_length, load_model, load_tokenizer, prepare_model
from fastppo.model.writing import write_model

VALUE_HEAD = "value_head.safetensors"


def histogram_of(config: CriticConfig) -> Histogram | None:
    """What the value head says; None for a number."""
    return None if config.head == "scalar" else Histogram(config.head, config.bins, *config.value_range)


def separate_critic(
    config: CriticConfig, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, longest: int
) -> Critic | None:
    """The critic that the settings want, if it is to have a trunk of its own: a copy of the policy's, or that of `critic.model`.

    Args:
        policy: prepared; the critic gets its type and device.
        tokenizer: the policy's.
        longest: most tokens of a prompt and its completion.

    Raises:
        ValueError: `critic.model` has another tokenizer, a shorter context or another value head, or cannot be used; the attention is to be
            frozen and is not found.
    """
    if config.kind != "separate":
        return None
    if config.model is None:
        critic = Critic.from_model(policy, histogram_of(config))
    else:
        require_same_tokenizer(config.model, tokenizer)
        model = load_model(config.model, dtype=policy.dtype, device=policy.device)
        _require_context(config.model, model, longest)
        _widen_embedding(model, policy.get_input_embeddings().weight.shape[0])
        critic = critic_on(prepare_model(model), config)
    if config.freeze_attention:
        critic.freeze_attention()
    return critic


def critic_on(model: PreTrainedModel, config: CriticConfig) -> Critic:
    """A critic on a prepared model's own trunk, with the value head of the folder `critic.model` where that is a critic's, else a new one."""
    critic = Critic.from_model(model, histogram_of(config), share=True)
    if config.model is not None and (head := Path(config.model) / VALUE_HEAD).is_file():
        _read_head(head, critic.head, config)
    return critic


def write_critic(
    critic: Critic, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: CriticConfig, path: str | Path
) -> None:
    """The critic's folder. model: the causal LM whose trunk is the critic's."""
    write_model(model, tokenizer, path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in critic.head.state_dict().items()}
    save_file(tensors, Path(path) / VALUE_HEAD, metadata=_head_settings(config))


def require_same_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where the model `name`, which `critic.model` is, reads other token ids than those of `tokenizer`, the policy's."""
    theirs, ours = load_tokenizer(name, "critic.model").get_vocab(), tokenizer.get_vocab()
    if theirs == ours:
        return
    token = min(text for text in theirs.keys() | ours.keys() if theirs.get(text) != ours.get(text))
    there, here = (f"has id {ids[token]}" if token in ids else "is not" for ids in (theirs, ours))
    raise ValueError(
        f"critic.model is {name!r}, whose tokenizer has {len(theirs)} tokens, expected the {len(ours)} of the policy's tokenizer "
        f"({tokenizer.name_or_path or type(tokenizer).__name__}), with their ids: {token!r} {there} there and {here} here"
    )


def _require_context(name: str, model: PreTrainedModel, longest: int) -> None:
    context = context_length(model)
    if context is not None and context < longest:
        raise ValueError(
            f"critic.model is {name!r}, whose context has {context} tokens, expected {longest} at least, the longest prompt with its completion"
        )


@torch.no_grad()
def _widen_embedding(model: PreTrainedModel, rows: int) -> None:
    """Rows of 0 for ids that the policy has beyond those of its tokenizer, which models of one family have more or less of."""
    found = model.get_input_embeddings().weight.shape[0]
    if found < rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
        model.get_input_embeddings().weight[found:] = 0


def _head_settings(config: CriticConfig) -> dict[str, str]:
    settings = {"head": config.head}
    if config.head != "scalar":
        settings |= {"bins": str(config.bins), "value_range": str([float(end) for end in config.value_range])}
    return settings


def _read_head(path: Path, head: nn.Module, config: CriticConfig) -> None:
    with safe_open(path, framework="pt") as file:
        written, expected = file.metadata() or {}, _head_settings(config)
        for name in ("head", "bins", "value_range"):
            if written.get(name) != expected.get(name):
                raise ValueError(
                    f"critic.{name} is {expected.get(name)}, expected {written.get(name)}, with which the critic in {path.parent} was trained"
                )
        head.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
