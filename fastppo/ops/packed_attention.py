"""Causal attention of packed sequences that may share prompts."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.native import as_offsets
from fastppo.native import packed_attention as native
from fastppo.native.decode_attention import MAX_HEAD_SIZE
from fastppo.ops import _checks
from fastppo.ops._backends import choose
from fastppo.ops._registry import custom_op, register_gradient
from fastppo.reference import packed_attention as reference


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    prompts: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v of each token over its sequence up to itself, and over the prompt that stands before it (FlashAttention,
    arXiv:2205.14135).

    Samples of one prompt need it but once: as a sequence of its own, that each of them names as what it follows. Its bits, and those of its
    gradients, depend neither on what else is packed nor on threads. On the CPU in fp32 a token has the bits that `decode_attention` gives it;
    float16 and bfloat16 are computed in fp32 and rounded once. On a GPU sums are fp32, and what is multiplied has q's type: probabilities and
    the gradients of scores are rounded to it.

    Args:
        q: [T, Hq, D] float32, bfloat16 or float16 (float64, and heads of more than 256, run in the reference): queries of T packed tokens.
        k, v: [T, Hkv, D] in q's dtype. Hq a multiple of Hkv (grouped-query attention, arXiv:2305.13245).
        cu_seqlens: int32 or int64 [S + 1]: sequence i is tokens [cu_seqlens[i], cu_seqlens[i + 1]); sequences may be empty.
        scale: multiplies the scores; by default D ** -0.5.
        window: a token sees itself and the window - 1 tokens before it, counted along its prompt and then its own sequence; None: all.
        prompts: int32 or int64 [S]: of each sequence the number of the one whose tokens it sees before its own, or -1 for none. It must
            be an earlier one that has none itself. None: no sequence has one.

    Returns:
        [T, Hq, D] in q's dtype; differentiable by q, k and v, where a prompt's k and v get the sum over all that follow it. NaN reaches
        no token that does not see it; on a GPU no sequence that does not.

    Raises:
        TypeError, ValueError: wrong type, shape or device, or (on the CPU) wrong offsets or a wrong prompt; on a GPU, where the host does not
            wait, the first make all results NaN, the second those of the sequence that has it.
    """
    _check_packed_attention(q, k, v, cu_seqlens, prompts)
    scale = q.shape[-1] ** -0.5 if scale is None else _checks.number("scale", scale)
    if window is not None:
        window = _checks.integer_number("window", window, at_least=1)
    backend = "reference" if q.shape[-1] > MAX_HEAD_SIZE else choose("packed_attention", q)
    if backend == "reference":
        if not torch.compiler.is_compiling():
            _checks.offsets_in_order("cu_seqlens", cu_seqlens, len(q))
            _check_prompts_stand_before(prompts)
        return reference.packed_attention(q, k, v, cu_seqlens, scale=scale, window=window, prompts=prompts)
    return _packed_attention(q, k, v, cu_seqlens, prompts, scale, window or 0, backend)[0]


def _check_packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, prompts: Tensor | None) -> None:
    _checks.floating("q", q)
    for name, x in (("k", k), ("v", v)):
        _checks.tensor(name, x)
        if x.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}, expected {q.dtype} like q")
        _checks.same_device(name, x, "q", q)
    if q.dim() != 3 or 0 in q.shape[1:]:
        raise ValueError(f"q has shape {list(q.shape)}, expected [T, Hq, D], Hq and D at least 1")
    tokens, heads, size = q.shape
    if k.dim() != 3 or k.shape[1] == 0 or (k.shape[0], k.shape[2]) != (tokens, size):
        raise ValueError(f"k has shape {list(k.shape)}, expected [{tokens}, Hkv, {size}] like q, Hkv at least 1")
    if heads % k.shape[1]:
        raise ValueError(f"q has {heads} heads and k {k.shape[1]}, expected Hq to be a multiple of Hkv")
    _checks.shape("v", v, k.shape, "k's shape")
    _checks.cu_seqlens("cu_seqlens", cu_seqlens, "q's tokens", q[:, 0, 0])
    if prompts is not None:
        _checks.integer("prompts", prompts)
        _checks.shape("prompts", prompts, (cu_seqlens.shape[0] - 1,), "one a sequence of cu_seqlens")
        _checks.same_device("prompts", prompts, "q", q)


def _check_prompts_stand_before(prompts: Tensor | None) -> None:
    if prompts is None or not len(prompts):
        return
    numbers = torch.arange(len(prompts), dtype=torch.int64, device=prompts.device)
    earlier = (prompts >= 0) & (prompts < numbers)
    good = (prompts == -1) | earlier & (prompts[torch.where(earlier, prompts, 0).long()] == -1)
    if not good.all():
        bad = int((~good).nonzero()[0])
        raise ValueError(
            f"prompts holds {prompts[bad].item()} at position {bad}, "
            f"expected -1 (none) or the number of an earlier sequence that has no prompt itself"
        )


def _layout(cu_seqlens: Tensor, prompts: Tensor | None, tokens: int) -> native.Layout:
    """A group is a sequence without a prompt and, behind it, those that follow it."""
    offsets = as_offsets(cu_seqlens, tokens)
    _check_prompts_stand_before(prompts)
    starts, ends = offsets[:-1], offsets[1:]
    own = torch.arange(len(starts), dtype=torch.int64, device=offsets.device)
    if prompts is None:
        none = torch.zeros_like(starts)
        return native.Layout(
            torch.stack([none, none, starts, ends, starts, starts], 1),
            torch.arange(len(offsets), dtype=torch.int64, device=offsets.device),
        )
    follows = prompts >= 0
    roots = torch.where(follows, prompts.long(), own)
    bounds = [torch.where(follows, x[roots], 0) for x in (starts, ends)]
    order = roots.argsort(stable=True)
    counts = roots[order].unique_consecutive(return_counts=True)[1]
    sequences = torch.stack([*bounds, starts, ends, starts, starts], 1)[order]
    return native.Layout(sequences, torch.nn.functional.pad(counts.cumsum(0), (1, 0)))


def _with_packed_heads(x: Tensor) -> Tensor:
    """fp32 with its last two dimensions contiguous; the first may have any stride."""
    x = x.float()
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()


@custom_op("packed_attention")
def _packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    prompts: Tensor | None,
    scale: float,
    window: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from fastppo.kernels.packed_attention import packed_attention_forward as kernel

        return kernel(q, k, v, cu_seqlens, prompts, scale, window)
    layout = _layout(cu_seqlens, prompts, len(q))
    out, lse = native.packed_attention(*map(_with_packed_heads, (q, k, v)), layout, scale, window)
    return out.to(q.dtype), lse


@torch.library.register_fake("fastppo::packed_attention")
def _(q, k, v, cu_seqlens, prompts, scale, window, backend):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@custom_op("packed_attention_backward")
def _packed_attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    prompts: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "triton":
        from fastppo.kernels.packed_attention import packed_attention_backward as kernel

        return kernel(d_out, q, k, v, cu_seqlens, prompts, out, lse, scale, window)
    layout, upstream = _layout(cu_seqlens, prompts, len(q)), d_out.float().contiguous()
    operands = *map(_with_packed_heads, (q, k, v)), layout, out.float(), lse
    d_q, d_k, d_v = native.packed_attention_backward(upstream, *operands, scale, window)
    return d_q.to(q.dtype), d_k.to(q.dtype), d_v.to(q.dtype)


@torch.library.register_fake("fastppo::packed_attention_backward")
def _(d_out, q, k, v, cu_seqlens, prompts, out, lse, scale, window, backend):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, outputs) -> None:
    out, lse = outputs
    ctx.save_for_backward(inputs.q, inputs.k, inputs.v, inputs.cu_seqlens, inputs.prompts, out, lse)
    ctx.options = inputs.scale, inputs.window, inputs.backend
    ctx.mark_non_differentiable(lse)


def _backward(ctx, d_out, _):
    return _packed_attention_backward(d_out, *ctx.saved_tensors, *ctx.options)


register_gradient(_packed_attention, ("q", "k", "v"), _setup_context, _backward)
