"""Prompts and decode steps of models that are built as Llama is, with a few calls of our own kernels in place of their modules.

On a CPU a decode step is a single native call (`csrc/cpu/decoder.cpp`), so is each part of a prompt: Python between embedding and head would be
most of a small model's time. On a GPU the operations between matrix products are three Triton kernels (`kernels/decoder.py`). Both read the
live parameters; of layers with a LoRA adapter they read a copy in which it is merged, made when a cache is lent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from fastppo.model.attention import LayerShape, ObservingContext
from fastppo.model.parts import ALLOWED_ERROR, LARGEST_HEAD, LlamaParts
from fastppo.native import decoder as native
from fastppo.ops import batch_invariant_linear, decode_attention
from fastppo.rollout.decoder import Decoder, ModuleDecoder
from fastppo.rollout.pages import PagedCache

PREFILL_ROWS = 1024
"""Prompt tokens that run side by side where a GPU's decode steps take them."""


def parts_decoder(
    parts: LlamaParts,
    modules: ModuleDecoder,
    cache: PagedCache,
    seen: ObservingContext,
    *,
    rows: int,
    positions: int,
    exact: bool = False,
) -> Decoder:
    """For at most `rows` sequences side by side, of at most `positions` tokens each. `modules` run a GPU's prompts, unless it is to be exact."""
    cos, sin = parts.rotary_tables(positions)
    layers = [
        native.Layer(norms, linears, *cache.layers[i], seen.options[i].scale, seen.options[i].window)
        for i, (norms, linears) in enumerate(parts.merged_layers())
    ]
    if parts.backend == "triton":
        kind = ExactDecoder if exact else FusedDecoder
        return kind(modules, layers, parts.embedding, parts.norm, cos, sin)
    return native.Decoder(layers, parts.embedding, parts.norm, cos, sin, rows=rows)


def parts_agree(parts: LlamaParts, model: PreTrainedModel, seen: ObservingContext) -> bool:
    """Whether our step gives what the model's modules give, for two sequences at their second token."""
    if any(options.needs_scores for options in seen.options.values()) or any(map(_odd_heads, seen.shapes.values())):
        return False
    device, found = parts.embedding.device, []
    block_table = torch.tensor([[1], [0]], dtype=torch.int32, device=device)
    for own in (False, True):
        cache = PagedCache(seen.shapes, 2, device)
        modules = ModuleDecoder(model, cache)
        decoder = parts_decoder(parts, modules, cache, seen, rows=2, positions=2) if own else modules
        for length in (1, 2):
            tokens = torch.tensor([length, len(parts.embedding) - length], dtype=torch.int64, device=device)
            hidden = decoder.step(tokens, torch.full((2,), length, dtype=torch.int64, device=device), block_table)
        found.append(hidden.double())
    error = (found[1] - found[0]).norm() / found[0].norm().clamp_min(1e-30)
    return bool(error <= ALLOWED_ERROR[parts.embedding.dtype])


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

    def prefill(self, tokens: list[list[int]], pages: list[list[int]], past: list[int]) -> Tensor:
        return self._modules.prefill(tokens, pages, past)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def step(self, tokens: Tensor, lengths: Tensor, block_table: Tensor) -> Tensor:
        from fastppo.kernels import decoder as kernels

        x, update, context_lens = F.embedding(tokens, self._embedding), None, lengths.int()
        for layer in self._layers:
            input_norm, q_norm, k_norm, post_norm = layer.norms
            q, k, v, o, gate, up, down = layer.linears
            y = kernels.add_rms_norm(x, update, *input_norm)
            heads = [self._linear(y, *linear) for linear in (q, k, v)]
            rotary = self._cos, self._sin
            queries = kernels.place_heads(
                *heads, q_norm, k_norm, *rotary, lengths, block_table, layer.k_pages, layer.v_pages
            )
            options = {"scale": layer.scale, "window": layer.window}
            attended = decode_attention(queries, layer.k_pages, layer.v_pages, block_table, context_lens, **options)
            y = kernels.add_rms_norm(x, self._linear(attended.flatten(1), *o), *post_norm)
            gated = kernels.apply_gate(self._linear(y, *gate), self._linear(y, *up))
            update = self._linear(gated, *down)
        return kernels.add_rms_norm(x, update, *self._norm)


class ExactDecoder(FusedDecoder):
    """Steps whose bits do not depend on the rows side by side. It takes prompts too, whose tokens are rows of a step."""

    def prefill(self, tokens: list[list[int]], pages: list[list[int]], past: list[int]) -> Tensor:
        device = self._embedding.device
        return native.prefill_by_steps(self.step, tokens, pages, past, rows=PREFILL_ROWS, device=device)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return batch_invariant_linear(x, weight, bias)


def _odd_heads(shape: LayerShape) -> bool:
    return shape.key_size != shape.value_size or shape.key_size > LARGEST_HEAD
