"""A model that is built as Llama is, as parts: norms, projections, rotary embedding, gate, which our own kernels run.

The parts are the live parameters. Names and parameters of the modules decide whether a model has them; whoever runs the parts compares
numbers with the modules' before relying on them.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastppo.model.lora import Factors, active_factors, is_plain_lora, merged
from fastppo.native import decoder as native
from fastppo.ops._backends import FAST_DTYPES, choose, forced_backend

SERVED = {"cpu": (torch.float32,), "triton": FAST_DTYPES}
# Rotary frequencies that change with the longest sequence of a batch.
CHANGING_ROPE = ("dynamic", "longrope")
# In the names of hooks that change nothing.
IDLE_HOOKS = ("enable_input_require_grads", "output_capturing_hook")
# Positions whose cosines are made in one call: a vector of a different length could have other bits at its end.
ROTARY_BLOCK = 1024
LARGEST_HEAD = 256
# Relative error (Frobenius norm) between the two ways, above which a model only looks Llama-like: rounding, of whose kinds a few differ.
ALLOWED_ERROR = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

_ROTARY_TABLES: WeakKeyDictionary[nn.Module, tuple[tuple, tuple[Tensor, Tensor]]] = WeakKeyDictionary()


class UnlikeLlama(Exception):
    """The model has something that our kernels do not."""


def parts_of(model: PreTrainedModel) -> LlamaParts | None:
    """The model's parts, those of the last call while nothing but numbers has changed; None where it has none."""
    signature = [forced_backend(), dict(vars(model.config)), *map(_signature, model.modules())]
    known, parts = _PARTS.get(model, (None, None))
    if known != signature:
        try:
            parts = LlamaParts(model)
        except UnlikeLlama:
            parts = None
        _PARTS[model] = signature, parts
    return parts


def why_not_parts(model: PreTrainedModel) -> str | None:
    """Why the model's own modules run wherever it is; None where it is built as Llama is."""
    try:
        LlamaParts(model)
    except UnlikeLlama as reason:
        return str(reason)
    return None


def is_exact(model: PreTrainedModel) -> bool:
    """Whether `make_exact` has been asked for a token's bits to be the same sampled, scored and trained."""
    return model in EXACT


EXACT: WeakSet[nn.Module] = WeakSet()

_PARTS: WeakKeyDictionary[nn.Module, tuple[list, LlamaParts | None]] = WeakKeyDictionary()


def _signature(module: nn.Module) -> tuple:
    """What of a module decides whether it is a part."""
    parameters = [(id(p), p.dtype, p.device, p.stride()) for p in module._parameters.values() if p is not None]
    return id(module), type(module), _is_patched(module), parameters, (*vars(module).get("merged_adapters", ()),)


class LlamaParts:
    """The parts of a model that is built as Llama is (arXiv:2302.13971): Qwen2, Qwen3, Mistral, SmolLM and others too.

    backend: which kernels would run them. layers: of each, its norms and its linear layers as `fastppo.native.decoder.Layer` has them, without
    what LoRA adapters add to these. has_adapters: whether some have any.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises UnlikeLlama. To be called with all forwards in place."""
        if any(map(_is_patched, model.modules())):
            raise UnlikeLlama("it has hooks or forwards of its own")
        trunk = _children(model.base_model, {"embed_tokens", "layers", "norm", "rotary_emb"})
        self.rotary = trunk["rotary_emb"]
        if getattr(self.rotary, "rope_type", None) in (None, *CHANGING_ROPE):
            raise UnlikeLlama("its rotary embedding is not fixed")
        embedding = trunk["embed_tokens"]
        odd = type(embedding) is not nn.Embedding or embedding.max_norm is not None
        if odd or embedding.scale_grad_by_freq or embedding.sparse:
            raise UnlikeLlama("its embedding is not plain")
        self.embedding, self.padding_idx = embedding.weight, embedding.padding_idx
        self.norm = _norm(trunk["norm"])
        found = [_layer(layer) for layer in trunk["layers"]]
        if not found:
            raise UnlikeLlama("it has no layers")
        self.layers = [(norms, tuple(map(_linear, modules))) for norms, modules in found]
        self._modules = [modules for _, modules in found]
        self.has_adapters = any(type(module) is not nn.Linear for modules in self._modules for module in modules)
        self.backend: str | None = None  # an outline's numbers are served by nobody
        if not self.embedding.is_meta:
            self.backend = choose("decode_attention", self.embedding)
            self._require_served()

    def factors(self) -> list[tuple[Factors | None, ...]]:
        """What the adapters that are active now add to the weights, in the order of each layer's linear layers."""
        return [
            tuple(None if type(each) is nn.Linear else active_factors(each) for each in own) for own in self._modules
        ]

    def merged_layers(self) -> list[tuple[tuple[native.Norm, ...], tuple[native.Linear, ...]]]:
        """`layers` with the adapters that are active now in the weights: copies of those that have one, the live parameters of the others."""
        return [
            (
                norms,
                tuple(linear._replace(weight=merged(linear.weight, f)) for linear, f in zip(linears, own, strict=True)),
            )
            for (norms, linears), own in zip(self.layers, self.factors(), strict=True)
        ]

    @torch.no_grad()
    def rotary_tables(self, positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin [P, R] of at least the first `positions` positions; those of a position have the same bits in every call."""
        frequencies = self.rotary.inv_freq
        key = (frequencies.data_ptr(), frequencies._version, self.embedding.dtype, self.embedding.device)
        known, blocks = _ROTARY_TABLES.get(self.rotary, (None, ()))
        if known != key or len(blocks[0]) < positions:
            starts = range(0, positions, ROTARY_BLOCK)
            places = (torch.arange(n, n + ROTARY_BLOCK, dtype=torch.int64, device=key[-1]) for n in starts)
            made = [self.rotary(self.embedding.new_zeros(1, 1, 1), block[None]) for block in places]
            blocks = tuple(torch.cat([x[0] for x in kind]) for kind in zip(*made, strict=True))
            _ROTARY_TABLES[self.rotary] = key, blocks
        return blocks

    def _require_served(self) -> None:
        """Raises UnlikeLlama for parameters that no kernel takes as they lie."""
        tensors = [self.embedding, self.norm.weight]
        for norms, linears in self.layers:
            tensors += [norm.weight for norm in norms] + [x for linear in linears for x in linear]
        tensors += [x for own in self.factors() if self.backend == "cpu" for f in own if f is not None for x in f[:2]]
        kinds = {(x.dtype, x.device, x.is_contiguous()) for x in tensors if x is not None}
        dtype, device = self.embedding.dtype, self.embedding.device
        if kinds != {(dtype, device, True)} or dtype not in SERVED.get(self.backend, ()):
            raise UnlikeLlama("its parameters are not contiguous tensors of one type and device that the kernels serve")


def _is_patched(module: nn.Module) -> bool:
    """Whether a call of the module does something besides what its class says."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return "forward" in vars(module) or not all(map(_is_idle, hooks))


def _is_idle(hook: object) -> bool:
    """What Transformers leaves on modules: where gradients are checkpointed the embedding's output gets one, which nobody reads; what hidden
    states or attention weights were once asked of notes nothing before they are asked for again.
    """
    return any(name in getattr(hook, "__qualname__", "") for name in IDLE_HOOKS)


def _layer(layer: nn.Module) -> tuple[tuple[native.Norm, ...], tuple[nn.Module, ...]]:
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
    return norms, tuple(owner[name] for owner, name in names)


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
    return native.Norm(module.weight, eps)


def _linear(module: nn.Module) -> native.Linear:
    module = module.base_layer if is_plain_lora(module) else module
    if type(module) is not nn.Linear:
        raise UnlikeLlama(f"{type(module).__name__} is no plain linear layer")
    return native.Linear(module.weight, module.bias)
