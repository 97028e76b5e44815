"""Log-probability of each label, and the entropy of each row, from hidden states: the logits exist a tile at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.ops._backends import choose
from fastppo.ops._head import (
    Head,
    HeadGradients,
    Statistics,
    Upstream,
    check_head,
    exact_products,
    finish_state,
    kept_rows,
    kept_tiles_shape,
    lift_for,
    tile_gradient,
    tiles,
    whole_row_statistics,
)
from fastppo.ops._registry import custom_op, register_gradient
from fastppo.ops._sharded_head import IGNORED, Slices, merge
from fastppo.ops.token_logprobs import TokenLogprobs, Transform, check_logit_options
from fastppo.reference import linear_token_logprobs as reference


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    batch_invariant: bool = False,
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor | TokenLogprobs:
    """`token_logprobs` of the logits hidden @ weight.T + bias, which never exist as a whole and are never rounded below fp32.

    Forward 2 N H V flops; backward 6 N H V, since it makes the logits again, but for those that it finds kept: on a CPU all where they
    take no more than a tile, else a fifth (at most 48 MiB). Extra memory besides: a tile of logits (16 MiB), its inputs, and where hidden
    is half-precision or has ignored rows an fp32 copy of its gradient. Rows that are ignored are left out of every product; a frozen
    hidden or weight costs no product.

    Args:
        hidden: [..., H] float32, bfloat16 or float16 (float64 runs in the reference); weight: [V, H]; bias: [V] or None, of any
            of those types (mixed ones as autocast makes them).
        labels: [...] int64 or int32 token ids in [0, V), or `ignore_index`.
        temperature, softcap, logit_scale, ignore_index, return_entropy: as for `token_logprobs`.
        batch_invariant: logits have the bits of `batch_invariant_linear` (in fp32), and log-probs those of `token_logprobs` of them, whatever
            other rows there are: what a sampler finds that computes so. On a GPU tiles are whole rows then.
        tp_group: process group whose ranks share the head: weight [V_i, H] and bias [V_i] are this rank's slice of the vocabulary, the slices
            stand in the order of the ranks (of one size or not), and labels count from 0 to the sum of all V_i. Every rank calls it with the same
            hidden and labels and gets the same bits; in the backward pass every rank brings the same gradient of the result, hidden's gradient is
            the sum over the ranks, and those of weight and bias stay with the slice. Ranks exchange three or four numbers a row and, backward,
            the gradient of hidden in fp32. Not inside `torch.compile`.

    Returns:
        float32 [...] log-probabilities in nats, or `TokenLogprobs(logprobs, entropy)`.

    Raises:
        TypeError, ValueError: wrong type, shape or device, a number or (on the CPU) a label out of range, `batch_invariant` without
            a kernel (in float64, say) or with `tp_group`.
    """
    check_logit_options(temperature, softcap, logit_scale)
    check_head(hidden, weight, bias, labels)
    head = [x for x in (hidden, weight, bias) if x is not None]
    backend = choose("linear_token_logprobs", *head)
    if batch_invariant and backend == "reference":
        raise ValueError(
            f"batch_invariant is True, expected False for {hidden.dtype} on {hidden.device} (backend {backend})"
        )
    if tp_group is not None:
        _check_sharded(tp_group, batch_invariant)
    if backend == "reference":
        out = reference.linear_token_logprobs(
            hidden,
            weight,
            labels,
            bias,
            tp_group=tp_group,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=ignore_index,
            return_entropy=return_entropy,
        )
        return TokenLogprobs(*out) if return_entropy else out
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in head)
    if tp_group is not None:
        transform, more = (temperature, softcap or 0.0, logit_scale), (ignore_index, return_entropy, differentiable)
        out = _ShardedTokenLogprobs.apply(hidden, weight, labels.long(), bias, transform, *more, backend, tp_group)
        return TokenLogprobs(*out) if return_entropy else out[0]
    options = (temperature, softcap or 0.0, logit_scale, ignore_index, return_entropy)
    options += (batch_invariant, differentiable, backend)
    logprobs, entropy, *_ = _linear_token_logprobs(hidden, weight, labels.long(), bias, *options)
    return TokenLogprobs(logprobs, entropy) if return_entropy else logprobs


def _check_sharded(group: dist.ProcessGroup, batch_invariant: bool) -> None:
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"tp_group is {type(group).__name__}, expected a torch.distributed.ProcessGroup that this rank is in"
        )
    if batch_invariant:
        raise ValueError("batch_invariant is True, expected False with tp_group, whose slices are summed one by one")


@custom_op("linear_token_logprobs")
def _linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    return_entropy: bool,
    batch_invariant: bool,
    keep_logits: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, entropies or empty, (max, log-sum)), each [...] with 0 in the rows that are ignored; some tiles' logits."""
    keep = kept_rows(labels, None, len(weight), ignore_index, backend)
    kept = _kept_tiles(hidden, weight, labels, keep_logits, backend)
    head = Head(hidden, weight, bias, keep, backend, batch_invariant)
    transform = (logit_scale, softcap, temperature)
    with exact_products(hidden):
        if head.whole_rows:
            statistics = whole_row_statistics(head, kept, head.take(labels), ignore_index, transform)
        else:
            statistics = _statistics(head, kept, head.take(labels), transform, return_entropy)
    logprobs, entropy, max_logsum = statistics
    made_entropy = head.put(entropy) if return_entropy else logprobs.new_empty(0)
    return head.put(logprobs), made_entropy, head.put(max_logsum), kept


def _statistics(head: Head, kept: Tensor, labels: Tensor, transform: Transform, return_entropy: bool) -> Statistics:
    state = head.new_state(head.count)
    for tile in tiles(head, kept, backward=False):
        in_block = labels[tile.places] - tile.block.start
        head.kernels.token_logprobs_add_tile(tile.logits, in_block, transform, return_entropy, state[tile.places])
    return finish_state(state)


def _kept_tiles(hidden: Tensor, weight: Tensor, labels: Tensor, keep_logits: bool, backend: str) -> Tensor:
    shape = kept_tiles_shape(labels.numel(), weight.shape[0], backend) if keep_logits else (0, 0)
    return hidden.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("fastppo::linear_token_logprobs")
def _(hidden, weight, labels, bias, *options):
    *_, return_entropy, _, keep_logits, backend = options
    logprobs = hidden.new_empty(labels.shape, dtype=torch.float32)
    entropy = torch.empty_like(logprobs) if return_entropy else logprobs.new_empty(0)
    kept = _kept_tiles(hidden, weight, labels, keep_logits, backend)
    return logprobs, entropy, logprobs.new_empty((*labels.shape, 2)), kept


@custom_op("linear_token_logprobs_backward")
def _linear_token_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    max_logsum: Tensor,
    kept: Tensor,
    entropy: Tensor,
    d_logprobs: Tensor,
    d_entropy: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    batch_invariant: bool,
    wanted: Sequence[bool],
    hidden_in_fp32: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias in their own types (hidden's in fp32 if so asked), each empty where not `wanted`."""
    head = Head(hidden, weight, bias, labels != ignore_index, backend, batch_invariant)
    entropy = entropy if d_entropy is not None else None
    given = [None if x is None else head.take(x) for x in (max_logsum, entropy, d_logprobs, d_entropy)]
    rows = Upstream(head.labels(labels), *given)
    lift = lift_for(rows.peak()) if head.dtype == torch.float16 else None
    rows = rows.lifted(lift)
    d_hidden_dtype = torch.float32 if hidden_in_fp32 else hidden.dtype
    dtypes = d_hidden_dtype, weight.dtype, None if bias is None else bias.dtype
    wanted_dtypes = [dtype if want else None for dtype, want in zip(dtypes, wanted, strict=True)]
    gradients = HeadGradients(head, wanted_dtypes, lift)
    transform = (logit_scale, softcap, temperature)
    with exact_products(hidden):
        for tile in tiles(head, kept, backward=True):
            tile_gradient(head, tile.block, tile.logits, rows.part(tile.places), transform, tile.gradient)
            gradients.add(tile.places, tile.block, tile.weight, tile.inputs, tile.gradient)
    d_hidden, d_weight, d_bias = gradients.finish()
    made = None if d_hidden is None else d_hidden.view(hidden.shape), d_weight, d_bias
    return tuple(hidden.new_empty(0) if x is None else x for x in made)


@torch.library.register_fake("fastppo::linear_token_logprobs_backward")
def _(hidden, weight, labels, bias, *options):
    *_, wanted, hidden_in_fp32, _ = options
    d_hidden = hidden.float() if hidden_in_fp32 else hidden
    sources = zip((d_hidden, weight, bias), wanted, strict=True)
    return tuple(torch.empty_like(x) if want else hidden.new_empty(0) for x, want in sources)


def _setup_context(ctx, inputs, outputs) -> None:
    _, entropy, max_logsum, kept = outputs
    ctx.save_for_backward(inputs.hidden, inputs.weight, inputs.labels, inputs.bias, max_logsum, kept, entropy)
    ctx.options = inputs.temperature, inputs.softcap, inputs.logit_scale, inputs.ignore_index, inputs.batch_invariant
    ctx.return_entropy, ctx.backend = inputs.return_entropy, inputs.backend
    ctx.mark_non_differentiable(max_logsum, kept)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_logprobs, d_entropy, *_):
    hidden, weight, labels, bias, *statistics = ctx.saved_tensors
    if d_logprobs is None:
        d_logprobs = torch.zeros_like(labels, dtype=torch.float32)
    if not ctx.return_entropy:
        d_entropy = None
    upstream = *statistics, d_logprobs, d_entropy
    gradients = _linear_token_logprobs_backward(
        hidden, weight, labels, bias, *upstream, *ctx.options, ctx.wanted, False, ctx.backend
    )
    return [x if want else None for x, want in zip(gradients, ctx.wanted, strict=True)]


register_gradient(_linear_token_logprobs, ("hidden", "weight", "bias"), _setup_context, _backward)


class _ShardedTokenLogprobs(torch.autograd.Function):
    """The op over this rank's slice, what it finds merged with what the other ranks find in theirs; (logprobs, entropy or zeros) [...]."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        transform: tuple[float, float, float],
        ignore_index: int,
        return_entropy: bool,
        differentiable: bool,
        backend: str,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        slices, ignored = Slices.of(weight, labels, group), labels == ignore_index
        kept_rows(labels, None, slices.vocabulary if backend == "cpu" else 0, ignore_index, backend)
        options = *transform, IGNORED, return_entropy, False, differentiable, backend
        found = _linear_token_logprobs(hidden, weight, slices.local(labels, ignored, 0), bias, *options)
        logprobs, entropy, max_logsum, kept = found
        if labels.numel():
            entropies = entropy if return_entropy else None
            logprobs, entropy, max_logsum = merge(logprobs, entropies, max_logsum, slices.owners(labels), group)
        logprobs, entropy = (torch.where(ignored, 0, x) if x.numel() else x for x in (logprobs, entropy))
        # Past its end: no column of this slice is the label.
        local = slices.local(labels, ignored, len(weight))
        ctx.save_for_backward(hidden, weight, local, bias, max_logsum, kept, entropy)
        ctx.transform, ctx.return_entropy, ctx.backend, ctx.group = transform, return_entropy, backend, group
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logprobs: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, bias, max_logsum, kept, entropy = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[place] for place in (0, 1, 3)]
        if d_logprobs is None:
            d_logprobs = torch.zeros_like(labels, dtype=torch.float32)
        upstream = max_logsum, kept, entropy, d_logprobs, d_entropy if ctx.return_entropy else None
        options = *ctx.transform, IGNORED, False, wanted, True, ctx.backend
        gradients = _linear_token_logprobs_backward(hidden, weight, labels, bias, *upstream, *options)
        d_hidden, d_weight, d_bias = (x if want else None for x, want in zip(gradients, wanted, strict=True))
        if d_hidden is not None:
            if d_hidden.numel():
                dist.all_reduce(d_hidden, group=ctx.group)
            d_hidden = d_hidden.to(hidden.dtype)
        return d_hidden, d_weight, None, d_bias, *[None] * 6
