"""Prompts, and one more token for every sequence: by the model's own modules, or, where the model is a plain Llama-like one, natively.

Both read the live parameters. On a CPU the first swaps the linear layers for `batch_invariant_linear` while it takes a step; the second
(`csrc/cpu/decoder.cpp`) leaves no Python between embedding and head, which is most of a small model's time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

# As a module: fastppo.models imports this package for its attention, and may be only half loaded here.
from fastppo import models
from fastppo.native import decoder as native
from fastppo.native.batch_invariant_linear import batch_invariant_linear
from fastppo.ops._backends import FAST_DTYPES, choose
from fastppo.rollout.attention import ChunkContext, DecodeContext, PrefillContext, ShapeContext
from fastppo.rollout.pages import PAGE_SIZE, LayerShape, PagedCache

PREFILL_TOKENS = 8192
"""Most prompt tokens in one forward of the modules; a longer prompt is run in chunks."""

CHUNK_TOKENS = 2048
"""Tokens of a chunk. It depends on nothing, so that a prompt's keys do not either."""

# Relative error (Frobenius norm) between the two ways, above which a model only looks Llama-like.
ALLOWED_ERROR = 1e-4
LARGEST_HEAD = 256
# Rotary frequencies that change with the longest sequence of a batch.
CHANGING_ROPE = ("dynamic", "longrope")


def on_device(values: list, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor of `values`, for which the host does not wait: a copy from pageable memory would."""
    on_host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


class Decoder(Protocol):
    def prefill(self, prompts: list[list[int]], pages: list[list[int]]) -> Tensor:
        """Run prompts, each with the pages that its keys and values go to -> hidden [prompts, H] after their last tokens."""
        ...

    def step(self, tokens: Tensor, lengths: Tensor, block_table: Tensor) -> Tensor:
        """int64 tokens [B], the newest of sequences with `lengths` [B] tokens, int32 block_table [B, blocks] -> hidden [B, H]."""
        ...


class ModuleDecoder:
    """Runs the model's own modules."""

    def __init__(self, model: PreTrainedModel, cache: PagedCache, switch: DecodeSwitch) -> None:
        self._model, self._cache, self._switch = model, cache, switch

    def prefill(self, prompts: list[list[int]], pages: list[list[int]]) -> Tensor:
        if len(prompts) == 1 and len(prompts[0]) > PREFILL_TOKENS:
            return self._run_in_chunks(prompts[0], pages[0])
        bounds = [0]
        for prompt in prompts:
            bounds.append(bounds[-1] + len(prompt))
        device = self._model.device
        slots = torch.cat([self._slots(*pair) for pair in zip(prompts, pages, strict=True)])
        tokens = on_device([token for prompt in prompts for token in prompt], device)
        positions = torch.cat([torch.arange(len(prompt), device=device) for prompt in prompts])
        hidden = models.run_trunk(self._model, tokens, positions, PrefillContext(bounds, self._cache, slots))
        return hidden[on_device(bounds[1:], device) - 1]

    def _run_in_chunks(self, prompt: list[int], pages: list[int]) -> Tensor:
        device = self._model.device
        tokens, slots = on_device(prompt, device), self._slots(prompt, pages)
        for start in range(0, len(tokens), CHUNK_TOKENS):
            end = min(start + CHUNK_TOKENS, len(tokens))
            context = ChunkContext(start, self._cache, slots[:end])
            positions = torch.arange(start, end, device=device)
            hidden = models.run_trunk(self._model, tokens[start:end], positions, context)
        return hidden[-1:]

    def _slots(self, prompt: list[int], pages: list[int]) -> Tensor:
        """int64 [tokens]: the place of each of the prompt's tokens in the cache."""
        device = self._model.device
        places = on_device(pages, device)[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE, device=device)
        return places.flatten()[: len(prompt)]

    def step(self, tokens: Tensor, lengths: Tensor, block_table: Tensor) -> Tensor:
        context = DecodeContext(self._cache, block_table, lengths)
        self._switch.decoding = True
        hidden = models.run_trunk(self._model, tokens, lengths - 1, context)
        self._switch.decoding = False
        return hidden


class DecodeSwitch:
    """Whether the model is in a decode step just now."""

    decoding = False


@contextmanager
def decode_linears(model: nn.Module) -> Iterator[DecodeSwitch]:
    """Inside the block, the model's `nn.Linear` layers call our kernel while `switch.decoding` is set; afterwards they are as before.

    Only plain layers of a CPU model are touched: a subclass or a layer with a forward of its own stays what it is.
    """
    switch = DecodeSwitch()
    layers = [module for module in model.modules() if type(module) is nn.Linear and _is_served(module)]
    for layer in layers:
        layer.__dict__["forward"] = _forward(layer, switch)
    try:
        yield switch
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def _is_served(layer: nn.Linear) -> bool:
    weight = layer.weight
    fits = "forward" not in layer.__dict__ and weight.is_contiguous() and weight.dtype in FAST_DTYPES
    return fits and weight.device.type == "cpu" and choose("batch_invariant_linear", weight) == "cpu"


def _forward(layer: nn.Linear, switch: DecodeSwitch) -> Callable[[Tensor], Tensor]:
    weight, bias = layer.weight, layer.bias

    def forward(x: Tensor) -> Tensor:
        if switch.decoding and x.dtype == weight.dtype:
            return batch_invariant_linear(x, weight, bias)
        return F.linear(x, weight, bias)

    return forward


class UnlikeLlama(Exception):
    """The model has something that a native step does not."""


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
        self.embedding = _tensor(embedding.weight)
        if {choose(op, self.embedding) for op in ("batch_invariant_linear", "decode_attention")} != {"cpu"}:
            raise UnlikeLlama("its kernels are switched off")
        self.norm = _norm(trunk["norm"])
        self.layers = [_layer(layer) for layer in trunk["layers"]]
        if not self.layers:
            raise UnlikeLlama("it has no layers")

    def decoder(self, cache: PagedCache, seen: ShapeContext, *, rows: int, positions: int) -> native.Decoder:
        """For at most `rows` sequences side by side, of at most `positions` tokens each."""
        cos, sin = self.rotary(self.embedding.new_zeros(1, 1, 1), torch.arange(positions)[None])
        layers = [
            native.Layer(norms, linears, *cache.layers[i], seen.options[i].scale, seen.options[i].window)
            for i, (norms, linears) in enumerate(self.layers)
        ]
        return native.Decoder(layers, self.embedding, self.norm, cos[0].contiguous(), sin[0].contiguous(), rows=rows)

    def agrees(self, model: PreTrainedModel, switch: DecodeSwitch, seen: ShapeContext) -> bool:
        """Whether a native step gives what the model's modules give, for two sequences at their second token."""
        if any(options.needs_scores for options in seen.options.values()) or any(map(_odd_heads, seen.shapes.values())):
            return False
        block_table = torch.tensor([[1], [0]], dtype=torch.int32)
        found = []
        for make in (
            lambda cache: ModuleDecoder(model, cache, switch),
            lambda cache: self.decoder(cache, seen, rows=2, positions=2),
        ):
            decoder = make(PagedCache(seen.shapes, 2, self.embedding.device))
            for length in (1, 2):
                tokens = torch.tensor([length, len(self.embedding) - length])
                hidden = decoder.step(tokens, torch.full((2,), length), block_table)
            found.append(hidden.double())
        error = (found[1] - found[0]).norm() / found[0].norm().clamp_min(1e-30)
        return bool(error <= ALLOWED_ERROR)


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


def _tensor(x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or x.device.type != "cpu" or not x.is_contiguous():
        raise UnlikeLlama("its parameters are not contiguous fp32 on the CPU")
    return x.detach()


def _norm(module: nn.Module) -> native.Norm:
    parameters = dict(module.named_parameters())
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if parameters.keys() != {"weight"} or not isinstance(eps, float):
        raise UnlikeLlama(f"{type(module).__name__} is no RMS norm")
    return native.Norm(_tensor(module.weight), eps)


def _linear(module: nn.Module) -> native.Linear:
    if type(module) is not nn.Linear:
        raise UnlikeLlama(f"{type(module).__name__} is no plain linear layer")
    return native.Linear(_tensor(module.weight), None if module.bias is None else _tensor(module.bias))
