"""Log-probability of each label, and the entropy of each row, from hidden states: the logits exist a chunk at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastppo import native
from fastppo.ops._backends import choose
from fastppo.ops._chunked_head import ChunkedHead, check_head, kept_rows
from fastppo.ops.token_logprobs import TokenLogprobs, check_logit_options
from fastppo.reference import linear_token_logprobs as reference

NO_INDEX = -1  # rows that are ignored never reach the kernels


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
) -> Tensor | TokenLogprobs:
    """`token_logprobs` of the logits hidden @ weight.T + bias, which never exist as a whole and are never rounded below fp32.

    Forward 2 N H V flops; backward 6 N H V, since it makes each chunk's logits again. Extra memory: one chunk (32 MiB of logits)
    and fp32 sums of the gradients, whatever N is. Rows that are ignored are left out of every product; a frozen hidden or weight
    costs no product.

    Args:
        hidden: [..., H] float32, bfloat16 or float16 (float64 runs in the reference); weight: [V, H]; bias: [V] or None, of any
            of those types (mixed ones as autocast makes them).
        labels: [...] int64 or int32 token ids in [0, V), or `ignore_index`.
        temperature, softcap, logit_scale, ignore_index, return_entropy: as for `token_logprobs`.

    Returns:
        float32 [...] log-probabilities in nats, or `TokenLogprobs(logprobs, entropy)`.

    Raises:
        TypeError, ValueError: wrong type, shape or device, temperature <= 0, or (on the CPU) a label out of range.
    """
    check_logit_options(temperature, softcap, logit_scale)
    check_head(hidden, weight, bias, labels)
    head = [x for x in (hidden, weight, bias) if x is not None]
    if choose("linear_token_logprobs", *head) == "reference":
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
    logprobs, entropy, _ = _linear_token_logprobs(
        hidden, weight, labels.long(), bias, temperature, softcap or 0.0, logit_scale, ignore_index, return_entropy
    )
    return TokenLogprobs(logprobs, entropy) if return_entropy else logprobs


@torch.library.custom_op("fastppo::linear_token_logprobs", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, entropies or empty, (max, log-sum)), each [...] with 0 in the rows that are ignored."""
    keep = kept_rows(labels, None, len(weight), ignore_index)
    rows = keep.reshape(-1).nonzero().squeeze(1)
    kept_labels = labels.reshape(-1)[rows]
    head = ChunkedHead(hidden, weight, bias, rows, (False, False, False))
    logprobs = hidden.new_zeros(labels.shape, dtype=torch.float32)
    entropy = torch.zeros_like(logprobs) if return_entropy else logprobs.new_empty(0)
    max_logsum = logprobs.new_zeros((*labels.shape, 2))
    transform = (logit_scale, softcap, temperature)
    # Under autocast the products would be rounded to half precision.
    with torch.autocast(hidden.device.type, enabled=False):
        for places, logits in head.chunks():
            chunk = native.token_logprobs_forward(
                logits[None], kept_labels[places], NO_INDEX, transform, return_entropy
            )
            here = rows[places]
            logprobs.view(-1)[here], max_logsum.view(-1, 2)[here] = chunk[0], chunk[2]
            if return_entropy:
                entropy.view(-1)[here] = chunk[1]
    return logprobs, entropy, max_logsum


@_linear_token_logprobs.register_fake
def _(hidden, weight, labels, bias, temperature, softcap, logit_scale, ignore_index, return_entropy):
    logprobs = hidden.new_empty(labels.shape, dtype=torch.float32)
    entropy = torch.empty_like(logprobs) if return_entropy else logprobs.new_empty(0)
    return logprobs, entropy, logprobs.new_empty((*labels.shape, 2))


@torch.library.custom_op("fastppo::linear_token_logprobs_backward", mutates_args=())
def _linear_token_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    max_logsum: Tensor,
    entropy: Tensor,
    d_logprobs: Tensor,
    d_entropy: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias in their own types, each empty where not `wanted`."""
    rows = (labels != ignore_index).reshape(-1).nonzero().squeeze(1)
    kept_labels = labels.reshape(-1)[rows]
    statistics, d_logprobs = max_logsum.view(-1, 2)[rows], d_logprobs.reshape(-1)[rows]
    kept_entropy = entropy.view(-1)[rows] if d_entropy is not None else None
    d_entropy = None if d_entropy is None else d_entropy.reshape(-1)[rows]
    head = ChunkedHead(hidden, weight, bias, rows, wanted)
    transform = (logit_scale, softcap, temperature)
    with torch.autocast(hidden.device.type, enabled=False):
        for places, logits in head.chunks():
            of_entropy = [None if x is None else x[places] for x in (kept_entropy, d_entropy)]
            native.token_logprobs_backward(
                logits[None], kept_labels[places], NO_INDEX, transform, statistics[places],
                of_entropy[0], d_logprobs[places], of_entropy[1], logits[None],
            )  # fmt: skip
            head.add_gradients(places, logits)
    sources = zip(head.gradients, (hidden, weight, bias), strict=True)
    d_hidden, d_weight, d_bias = (gradient if x is None else gradient.to(x.dtype) for gradient, x in sources)
    return d_hidden, d_weight, d_bias


@_linear_token_logprobs_backward.register_fake
def _(hidden, weight, labels, bias, *options):
    *_, wanted = options
    sources = zip((hidden, weight, bias), wanted, strict=True)
    return tuple(torch.empty_like(x) if want else hidden.new_empty(0) for x, want in sources)


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, labels, bias, *options, return_entropy = inputs
    _, entropy, max_logsum = output
    ctx.save_for_backward(hidden, weight, labels, bias, max_logsum, entropy)
    ctx.options, ctx.return_entropy = options, return_entropy
    ctx.mark_non_differentiable(max_logsum)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_logprobs, d_entropy, _):
    hidden, weight, labels, bias, max_logsum, entropy = ctx.saved_tensors
    if d_logprobs is None:
        d_logprobs = torch.zeros_like(labels, dtype=torch.float32)
    if not ctx.return_entropy:
        d_entropy = None
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[3]]
    gradients = _linear_token_logprobs_backward(
        hidden, weight, labels, bias, max_logsum, entropy, d_logprobs, d_entropy, *ctx.options, wanted
    )
    d_hidden, d_weight, d_bias = (x if want else None for x, want in zip(gradients, wanted, strict=True))
    return d_hidden, d_weight, None, d_bias, *[None] * 5


_linear_token_logprobs.register_autograd(_backward, setup_context=_setup_context)
