"""Describes a Llama-like decoder to the kernels and runs its prompts and decode steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastppo.native import _C, address, threads

PREFILL_ROWS = 256
"""Prompt tokens that run side by side: enough for the matrix products, and few enough that their activations stay in the cache."""


class Norm(NamedTuple):
    """An RMS norm; no weight: no norm."""

    weight: Tensor | None
    eps: float


class Linear(NamedTuple):
    weight: Tensor  # [N, K], consecutive elements in its rows
    bias: Tensor | None  # [N]


class Layer(NamedTuple):
    """x += o(attention(q, k, v of input_norm(x))), x += down(silu(gate(y)) * up(y)) with y = post_norm(x)."""

    norms: tuple[Norm, Norm, Norm, Norm]  # input, q, k, post
    linears: tuple[Linear, Linear, Linear, Linear, Linear, Linear, Linear]  # q, k, v, o, gate, up, down
    k_pages: Tensor  # [P, page, Hkv, D]
    v_pages: Tensor  # [P, page, Hkv, D]
    scale: float
    window: int | None


class Decoder:
    """Prompts, and decode steps of at most `rows` sequences. Everything is contiguous fp32 on the CPU, and kept alive here."""

    def __init__(
        self, layers: Sequence[Layer], embedding: Tensor, norm: Norm, cos: Tensor, sin: Tensor, *, rows: int
    ) -> None:
        """embedding [V, H]. cos, sin [positions, rotary size]."""
        self._kept = (layers, embedding, norm, cos, sin)
        self._layers = _C.DecoderLayers([_layer_tuple(layer) for layer in layers])
        pages, page_size, kv_heads, head_size = layers[0].k_pages.shape
        hidden_size, inner_size = embedding.shape[1], len(layers[0].linears[4].weight)
        heads = len(layers[0].linears[0].weight) // head_size
        self._page_sizes = (pages, page_size)
        self._model_sizes = (*embedding.shape[:1], *cos.shape, hidden_size, inner_size, heads, kv_heads, head_size)
        self._weights = (address(embedding), address(cos), address(sin))
        self._norm = _norm_tuple(norm)
        rows = max(rows, PREFILL_ROWS)
        self._hidden = torch.empty(rows, hidden_size, dtype=torch.float32, device="cpu")
        self._context_lens = torch.empty(rows, dtype=torch.int32, device="cpu")
        scratch_size = rows * 2 * (hidden_size + (heads + kv_heads) * head_size + inner_size)
        self._scratch = torch.empty(scratch_size, dtype=torch.float32, device="cpu")

    def prefill(self, tokens: list[list[int]], pages: list[list[int]], past: list[int]) -> Tensor:
        """As `prefill_by_steps`."""
        return prefill_by_steps(self.step, tokens, pages, past, rows=PREFILL_ROWS, device=self._hidden.device)

    def step(self, tokens: Tensor, lengths: Tensor, block_table: Tensor) -> Tensor:
        """int64 tokens and lengths [B], int32 block_table [B, blocks] -> hidden [B, H], which the next step overwrites."""
        hidden = self._hidden[: len(tokens)]
        embedding, cos, sin = self._weights
        addresses = (
            address(tokens), address(lengths), address(block_table), embedding, cos, sin,
            address(hidden), address(self._context_lens), address(self._scratch),
        )  # fmt: skip
        sizes = (len(tokens), block_table.shape[1], *self._page_sizes, *self._model_sizes)
        bad = _C.decoder_step(addresses, self._norm, sizes, self._layers, threads())
        if bad >= 0:
            raise ValueError(
                f"row {bad} has token {int(tokens[bad])}, length {int(lengths[bad])} and pages {block_table[bad].tolist()}: "
                f"expected a token in [0, {self._model_sizes[0]}), a length in [1, {self._model_sizes[1]}] and pages in [0, {self._page_sizes[0]})"
            )
        return hidden


def prefill_by_steps(
    step: Callable[[Tensor, Tensor, Tensor], Tensor],
    tokens: list[list[int]],
    pages: list[list[int]],
    past: list[int],
    *,
    rows: int,
    device: torch.device,
) -> Tensor:
    """Tokens of sequences that stand after `past` cached ones, and the sequences' pages -> hidden [sequences, H] after the last tokens.

    Steps of at most `rows` of these tokens: in each layer all rows write their keys before any attends, so a token finds those of
    the tokens before it, and has the bits that a step of its own would give it.
    """
    tables = pad_sequence([torch.tensor(own, dtype=torch.int32, device="cpu") for own in pages], batch_first=True)
    counts = _int64([len(own) for own in tokens])
    owners, last = _int64(range(len(tokens))).repeat_interleave(counts), counts.cumsum(0) - 1
    lengths = _int64([before + i for own, before in zip(tokens, past, strict=True) for i in range(1, len(own) + 1)])
    flat = _int64([token for own in tokens for token in own])
    found = []
    for start in range(0, len(flat), rows):
        part = slice(start, start + rows)
        hidden = step(*(x.to(device) for x in (flat[part], lengths[part], tables[owners[part]])))
        ending = last[(last >= start) & (last < start + rows)] - start
        found.append(hidden[ending.to(device)])
    return torch.cat(found)


def _int64(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def _norm_tuple(norm: Norm) -> tuple[int, float]:
    return (address(norm.weight), norm.eps)


def _linear_tuple(linear: Linear) -> tuple[int, int, int, int]:
    weight = linear.weight
    return (address(weight), address(linear.bias), len(weight), weight.stride(0))


def _layer_tuple(layer: Layer) -> tuple:
    norms, linears = [_norm_tuple(norm) for norm in layer.norms], [_linear_tuple(linear) for linear in layer.linears]
    return (norms, linears, (address(layer.k_pages), address(layer.v_pages)), layer.scale, layer.window or 0)
