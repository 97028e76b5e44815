"""What a Llama-like layer calls on a CPU in fp32. `layer_on_gpu` has the same names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastppo.native.matmul import linear, matmul
from fastppo.native.packed_attention import packed_attention, packed_attention_backward
from fastppo.native.rms_norm import rms_norm, rms_norm_backward
from fastppo.native.rotary_embedding import rotary_embedding
from fastppo.native.swiglu import swiglu, swiglu_backward

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


def attend(call: Call, heads: tuple[Tensor, Tensor, Tensor], norms: tuple[Tensor | None, Tensor | None]):
    """Projected q [W, Hq, D], k and v [T, Hkv, D], the norms of q and k -> (what attention gives [W, Hq, D], log-sum-exps fp32 [W, Hq])."""
    return packed_attention(*_placed(call, heads, norms), heads[2], call.layout, call.scale, call.window)


def attend_backward(
    call: Call,
    d_attended: Tensor,
    heads: tuple[Tensor, Tensor, Tensor],
    norms: tuple[Tensor | None, Tensor | None],
    attended: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q and k after norm and rotation, and of v."""
    placed, v = _placed(call, heads, norms), heads[2]
    return packed_attention_backward(d_attended, *placed, v, call.layout, attended, lse, call.scale, call.window)


def _placed(
    call: Call, heads: tuple[Tensor, Tensor, Tensor], norms: tuple[Tensor | None, Tensor | None]
) -> list[Tensor]:
    """q and k after the optional norm over each head, rotated to their positions."""
    placed = []
    for x, norm, eps, positions in zip(heads[:2], norms, call.head_eps, call.head_positions, strict=True):
        if norm is not None:
            x = rms_norm(x.flatten(0, 1), norm, eps)[1].view(x.shape)
        placed.append(rotary_embedding(x, call.cos, call.sin, positions))
    return placed
