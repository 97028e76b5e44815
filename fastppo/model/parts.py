"""A model that is built as Llama is, as parts: norms, projections, rotary embedding, gate, which our own kernels run.

The parts are the live parameters. Names and parameters of the modules decide whether a model has them; whoever runs the parts compares
numbers with the modules' before relying on them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from fastppo.native import decoder as native
from fastppo.ops._backends import FAST_DTYPES, choose

SERVED = {"cpu": (torch.float32,), "triton": FAST_DTYPES}
# Rotary frequencies that change with the longest sequence of a batch.
CHANGING_ROPE = ("dynamic", "longrope")


class UnlikeLlama(Exception):
    """The model has something that our kernels do not."""


class LlamaParts:
    """The parts of a model that is built as Llama is (arXiv:2302.13971): Qwen2, Qwen3, Mistral, SmolLM and others too.

    backend: which kernels would run them. layers: of each, its norms and its linear layers as `fastppo.native.decoder.Layer` has them.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises UnlikeLlama. To be called with all forwards in place."""
        if any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules()):
            raise UnlikeLlama("it has hooks or forwards of its own")
        trunk = _children(model.base_model, {"embed_tokens", "layers", "norm", "rotary_emb"})
        self.rotary = trunk["rotary_emb"]
        if getattr(self.rotary, "rope_type", None) in (None, *CHANGING_ROPE):
            raise UnlikeLlama("its rotary embedding is not fixed")
        embedding = trunk["embed_tokens"]
        if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
            raise UnlikeLlama("its embedding is not plain")
        self.embedding = embedding.weight.detach()
        self.backend = choose("decode_attention", self.embedding)
        self.norm = _norm(trunk["norm"])
        self.layers = [_layer(layer) for layer in trunk["layers"]]
        if not self.layers:
            raise UnlikeLlama("it has no layers")
        self._require_served()

    def _require_served(self) -> None:
        """Raises UnlikeLlama for parameters that no kernel takes as they lie."""
        tensors = [self.embedding, self.norm.weight]
        for norms, linears in self.layers:
            tensors += [norm.weight for norm in norms] + [x for linear in linears for x in linear]
        kinds = {(x.dtype, x.device, x.is_contiguous()) for x in tensors if x is not None}
        dtype, device = self.embedding.dtype, self.embedding.device
        if kinds != {(dtype, device, True)} or dtype not in SERVED.get(self.backend, ()):
            raise UnlikeLlama("its parameters are not contiguous tensors of one type and device that the kernels serve")


def _layer(layer: nn.Module) -> tuple[tuple[native.Norm, ...], tuple[native.Linear, ...]]:
    parts = _children(layer, {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
    attention = _children(parts["self_attn"], {"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"})
    mlp = _children(parts["mlp"], {"gate_proj", "up_proj", "down_proj", "act_fn"})
    probe = torch.tensor([-2.0, 3.0], dtype=torch.float32, device="cpu")
    if not torch.allclose(mlp["act_fn"](probe), F.silu(probe)):
        raise UnlikeLlama("its activation is not SiLU")
    own_norms = [
        _norm(attention[name]) if name in attention else native.Norm(None, 0.0) for name in ("q_norm", "k_norm")
    ]
    if any(norm.weight is not None and len(norm.weight) != parts["self_attn"].head_dim for norm in own_norms):
        raise UnlikeLlama("its query norm spans several heads")
    norms = (_norm(parts["input_layernorm"]), *own_norms, _norm(parts["post_attention_layernorm"]))
    names = [(attention, f"{x}_proj") for x in "qkvo"] + [(mlp, f"{x}_proj") for x in ("gate", "up", "down")]
    return norms, tuple(_linear(owner[name]) for owner, name in names)


def _children(module: nn.Module, needed: set[str], optional: set[str] = frozenset()) -> dict[str, nn.Module]:
    """The module's children by name; exactly these, and no parameter of its own."""
    found = dict(module.named_children())
    if needed - found.keys() or found.keys() - needed - optional or list(module.parameters(recurse=False)):
        raise UnlikeLlama(f"{type(module).__name__} consists of {', '.join(found)}")
    return found


def _norm(module: nn.Module) -> native.Norm:
    parameters = dict(module.named_parameters())
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if parameters.keys() != {"weight"} or not isinstance(eps, float):
        raise UnlikeLlama(f"{type(module).__name__} is no RMS norm")
    return native.Norm(module.weight.detach(), eps)


def _linear(module: nn.Module) -> native.Linear:
    if type(module) is not nn.Linear:
        raise UnlikeLlama(f"{type(module).__name__} is no plain linear layer")
    return native.Linear(module.weight.detach(), None if module.bias is None else module.bias.detach())
