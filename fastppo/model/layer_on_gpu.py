"""What a Llama-like layer calls on a GPU where it is to be exact: `layer_on_cpu`'s names, by the kernels of decode steps.

Forward, each packed token is a row of a decode step: the products of `batch_invariant_linear`, its key placed on a page of its sequence, and
attention over these pages up to itself. A row's bits do not depend on the rows beside it, so a token has the bits that a decode step gives
it. Backward nothing needs the same bits: the products are PyTorch's, attention that of packed sequences (FlashAttention), given the
log-sum-exps of the forward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastppo.kernels.batch_invariant_linear import batch_invariant_linear as linear
from fastppo.kernels.decode_attention import decode_attention
from fastppo.kernels.decoder import place_heads
from fastppo.kernels.packed_attention import packed_attention_backward
from fastppo.kernels.rms_norm import rms_norm_backward as norm_backward
from fastppo.kernels.rms_norm import rms_norm_forward
from fastppo.kernels.rotary_embedding import rotary_embedding
from fastppo.kernels.swiglu import swiglu_backward as gate_backward
from fastppo.kernels.swiglu import swiglu_forward
from fastppo.model.packed_pages import PAGE_SIZE

if TYPE_CHECKING:
    from fastppo.model.parts_trunk import Call

__all__ = [
    "attend",
    "attend_backward",
    "linear",
    "matmul",
    "rms_norm",
    "rms_norm_backward",
    "rotary_embedding",
    "swiglu",
    "swiglu_backward",
]

ROWS = 1024
"""Tokens that attend in one call: each takes memory for every 512 keys of the longest sequence, until they are summed."""


def attend(
    call: Call, heads: tuple[Tensor, Tensor, Tensor], norms: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Projected q [T, Hq, D], k and v [T, Hkv, D], the norms of q and k -> (what attention gives [T, Hq, D], log-sum-exps fp32 [T, Hq])."""
    queries, *pages = _placed(call, heads, norms)
    tables, lengths = call.layout.block_table, call.layout.lengths.int()
    rows = [slice(start, start + ROWS) for start in range(0, len(queries), ROWS)]
    options = call.scale, 0.0, call.window or 0, None
    found = [decode_attention(queries[own], *pages, tables[own], lengths[own], *options) for own in rows]
    attended, lse = zip(*found, strict=True)
    return torch.cat(attended), torch.cat(lse)


def attend_backward(
    call: Call,
    d_attended: Tensor,
    heads: tuple[Tensor, Tensor, Tensor],
    norms: tuple[Tensor | None, Tensor | None],
    attended: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q and k after norm and rotation, and of v."""
    queries, k_pages, _ = _placed(call, heads, norms)
    keys, layout = k_pages.flatten(0, 1)[call.layout.slots], call.layout
    bounds, numbers = (layout.cu_seqlens, layout.prompts), (call.scale, call.window or 0)
    return packed_attention_backward(d_attended, queries, keys, heads[2], *bounds, attended, lse, *numbers)


def _placed(
    call: Call, heads: tuple[Tensor, Tensor, Tensor], norms: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries after norm and rotation; keys so and values on the pages of their sequences, [pages, PAGE_SIZE, Hkv, D] each."""
    k, layout = heads[1], call.layout
    k_pages, v_pages = (k.new_empty(layout.pages, PAGE_SIZE, *k.shape[1:]) for _ in range(2))
    flat = [x.flatten(1) for x in heads]
    placing = zip(norms, call.head_eps, strict=True)
    queries = place_heads(*flat, *placing, call.cos, call.sin, layout.lengths, layout.block_table, k_pages, v_pages)
    if layout.copied is not None:
        source, target = layout.copied
        for pages in (k_pages, v_pages):
            places = pages.flatten(0, 1)
            places[target] = places[source]
    return queries, k_pages, v_pages


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None, *, accumulate: bool = False) -> Tensor:
    """a [M, K] @ b [K, N] -> [M, N] in their type; to `accumulate`, added to `out`."""
    return out.addmm_(a, b) if accumulate else torch.mm(a, b)


def rms_norm(x: Tensor, weight: Tensor, eps: float, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [N, H] and update [N, H] or None -> (x + update, its norm); without an update the first is x itself."""
    normed, total = rms_norm_forward(x, update, weight, eps, stepwise=True)
    return total, normed


def rms_norm_backward(
    x: Tensor, weight: Tensor, eps: float, d_normed: Tensor, d_total: Tensor | None, weight_wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x + update, which was normalised and went on besides with the gradient d_total, and of the weight."""
    d_x, d_weight = norm_backward(x, weight, d_normed, d_total, eps, weight_wanted)
    return d_x, d_weight.to(weight.dtype) if weight_wanted else None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return swiglu_forward(gate, up, torch.empty_like(gate), stepwise=True)


def swiglu_backward(
    gate: Tensor, up: Tensor, d_out: Tensor, *, out_wanted: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of gate and up and, where it is wanted, what `swiglu` gave."""
    return *gate_backward(gate, up, d_out), swiglu(gate, up) if out_wanted else None
