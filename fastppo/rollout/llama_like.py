"""Prompts and decode steps of models that are built as Llama is, with a few calls of our own kernels in place of their modules.

On a CPU a decode step is a single native call (`csrc/cpu/decoder.cpp`), so is each part of a prompt: Python between embedding and head would be
most of a small model's time. On a GPU the operations between matrix products are three Triton kernels (`kernels/decoder.py`). Both read the
live parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastppo.native import decoder as native
from fastppo.ops import decode_attention
from fastppo.ops._backends import FAST_DTYPES, choose
from fastppo.rollout.attention import ShapeContext
from fastppo.rollout.decoder import Decoder, DecodeSwitch, ModuleDecoder
from fastppo.rollout.pages import LayerShape, PagedCache

# Relative error (Frobenius norm) between the two ways, above which a model only looks Llama-like: rounding, of whose kinds a few differ.
ALLOWED_ERROR = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
SERVED = {"cpu": (torch.float32,), "triton": FAST_DTYPES}
LARGEST_HEAD = 256
# Rotary frequencies that change with the longest sequence of a batch.
CHANGING_ROPE = ("dynamic", "longrope")


class UnlikeLlama(Exception):
    """The model has something that our steps do not."""


class LlamaLike:
    """The parts of a model that is built as Llama is (arXiv:2302.13971): Qwen2, Qwen3, Mistral, SmolLM and others too.

    Module names and parameters decide, then `agrees` compares numbers: a model with a scale or an order of its own is told apart.
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

    def decoder(
        self, modules: ModuleDecoder, cache: PagedCache, seen: ShapeContext, *, rows: int, positions: int
    ) -> Decoder:
        """For at most `rows` sequences side by side, of at most `positions` tokens each. `modules` run a GPU's prompts."""
        places = torch.arange(positions, device=self.embedding.device)
        cos, sin = (x[0].contiguous() for x in self.rotary(self.embedding.new_zeros(1, 1, 1), places[None]))
        layers = [
            native.Layer(norms, linears, *cache.layers[i], seen.options[i].scale, seen.options[i].window)
            for i, (norms, linears) in enumerate(self.layers)
        ]
        if self.backend == "triton":
            return FusedDecoder(modules, layers, self.embedding, self.norm, cos, sin)
        return native.Decoder(layers, self.embedding, self.norm, cos, sin, rows=rows)

    def agrees(self, model: PreTrainedModel, switch: DecodeSwitch, seen: ShapeContext) -> bool:
        """Whether our step gives what the model's modules give, for two sequences at their second token."""
        if any(options.needs_scores for options in seen.options.values()) or any(map(_odd_heads, seen.shapes.values())):
            return False
        device, found = self.embedding.device, []
        block_table = torch.tensor([[1], [0]], dtype=torch.int32, device=device)
        for own in (False, True):
            cache = PagedCache(seen.shapes, 2, device)
            modules = ModuleDecoder(model, cache, switch)
            decoder = self.decoder(modules, cache, seen, rows=2, positions=2) if own else modules
            for length in (1, 2):
                tokens = torch.tensor([length, len(self.embedding) - length], device=device)
                hidden = decoder.step(tokens, torch.full((2,), length, device=device), block_table)
            found.append(hidden.double())
        error = (found[1] - found[0]).norm() / found[0].norm().clamp_min(1e-30)
        return bool(error <= ALLOWED_ERROR[self.embedding.dtype])


class FusedDecoder:
    """A GPU's decode steps: PyTorch's matrix products, and Triton kernels between them."""

    def __init__(
        self,
        modules: ModuleDecoder,
        layers: Sequence[native.Layer],
        embedding: Tensor,
        norm: native.Norm,
        cos: Tensor,
        sin: Tensor,
    ) -> None:
        """embedding [V, H]. cos, sin [positions, rotary size]."""
        self._modules, self._layers, self._embedding, self._norm = modules, layers, embedding, norm
        self._cos, self._sin = cos, sin

    def prefill(self, prompts: list[list[int]], pages: list[list[int]]) -> Tensor:
        return self._modules.prefill(prompts, pages)

    def step(self, tokens: Tensor, lengths: Tensor, block_table: Tensor) -> Tensor:
        from fastppo.kernels import decoder as kernels

        x, update, context_lens = F.embedding(tokens, self._embedding), None, lengths.int()
        for layer in self._layers:
            input_norm, q_norm, k_norm, post_norm = layer.norms
            q, k, v, o, gate, up, down = layer.linears
            y = kernels.add_rms_norm(x, update, *input_norm)
            heads = [F.linear(y, *linear) for linear in (q, k, v)]
            rotary = self._cos, self._sin
            queries = kernels.place_heads(
                *heads, q_norm, k_norm, *rotary, lengths, block_table, layer.k_pages, layer.v_pages
            )
            options = {"scale": layer.scale, "window": layer.window}
            attended = decode_attention(queries, layer.k_pages, layer.v_pages, block_table, context_lens, **options)
            y = kernels.add_rms_norm(x, F.linear(attended.flatten(1), *o), *post_norm)
            update = F.linear(kernels.apply_gate(F.linear(y, *gate), F.linear(y, *up)), *down)
        return kernels.add_rms_norm(x, update, *self._norm)


def _odd_heads(shape: LayerShape) -> bool:
    return shape.key_size != shape.value_size or shape.key_size > LARGEST_HEAD


def _layer(layer: nn.Module) -> tuple[tuple[native.Norm, ...], tuple[native.Linear, ...]]:
    parts = _children(layer, {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
    attention = _children(parts["self_attn"], {"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"})
    mlp = _children(parts["mlp"], {"gate_proj", "up_proj", "down_proj", "act_fn"})
    probe = torch.tensor([-2.0, 3.0])
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
