"""Log-probability of each label, and the entropy of each row, from hidden states: the logits exist a tile at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastppo.ops._backends import choose
from fastppo.ops._head import (
    Head,
    HeadGradients,
    Upstream,
    check_head,
    exact_products,
    finish_state,
    kept_rows,
    kept_tiles_shape,
    lift_for,
    tile_gradient,
    tiles,
)
from fastppo.ops._registry import custom_op, register_gradient
from fastppo.ops.token_logprobs import TokenLogprobs, check_logit_options
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
        batch_invariant: logits have the bits of `batch_invariant_linear`, and so the log-probs those that a sampler draws with, whatever
            other rows there are. On a CPU alone.

    Returns:
        float32 [...] log-probabilities in nats, or `TokenLogprobs(logprobs, entropy)`.

    Raises:
        TypeError, ValueError: wrong type, shape or device, a number or (on the CPU) a label out of range, `batch_invariant` elsewhere than on
            a CPU or in float64.
    """
    check_logit_options(temperature, softcap, logit_scale)
    check_head(hidden, weight, bias, labels)
    head = [x for x in (hidden, weight, bias) if x is not None]
    backend = choose("linear_token_logprobs", *head)
    if batch_invariant and backend != "cpu":
        raise ValueError(
            f"batch_invariant is True, expected False for {hidden.dtype} on {hidden.device} (backend {backend})"
        )
    if backend == "reference":
        out = reference.linear_token_logprobs(
            hidden,
            weight,
            labels,
            bias,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=ignore_index,
            return_entropy=return_entropy,
        )
        return TokenLogprobs(*out) if return_entropy else out
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in head)
    options = (temperature, softcap or 0.0, logit_scale, ignore_index, return_entropy)
    options += (batch_invariant, differentiable, backend)
    logprobs, entropy, *_ = _linear_token_logprobs(hidden, weight, labels.long(), bias, *options)
    return TokenLogprobs(logprobs, entropy) if return_entropy else logprobs


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
    kept_labels, state = head.take(labels), head.new_state(head.count)
    transform = (logit_scale, softcap, temperature)
    with exact_products(hidden):
        for tile in tiles(head, kept, backward=False):
            in_block = kept_labels[tile.places] - tile.block.start
            head.kernels.token_logprobs_add_tile(tile.logits, in_block, transform, return_entropy, state[tile.places])
    logprobs, entropy, max_logsum = finish_state(state)
    made_entropy = head.put(entropy) if return_entropy else logprobs.new_empty(0)
    return head.put(logprobs), made_entropy, head.put(max_logsum), kept


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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias in their own types, each empty where not `wanted`."""
    head = Head(hidden, weight, bias, labels != ignore_index, backend, batch_invariant)
    entropy = entropy if d_entropy is not None else None
    given = [None if x is None else head.take(x) for x in (max_logsum, entropy, d_logprobs, d_entropy)]
    rows = Upstream(head.labels(labels), *given)
    lift = lift_for(rows.peak()) if head.dtype == torch.float16 else None
    rows = rows.lifted(lift)
    sources = zip((hidden, weight, bias), wanted, strict=True)
    gradients = HeadGradients(head, [x.dtype if want else None for x, want in sources], lift)
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
    *_, wanted, _ = options
    sources = zip((hidden, weight, bias), wanted, strict=True)
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
        hidden, weight, labels, bias, *upstream, *ctx.options, ctx.wanted, ctx.backend
    )
    return [x if want else None for x, want in zip(gradients, ctx.wanted, strict=True)]


register_gradient(_linear_token_logprobs, ("hidden", "weight", "bias"), _setup_context, _backward)
