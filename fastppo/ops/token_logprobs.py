"""Log-probability of each label, and the entropy of each row, from logits that are read once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.native import collapse_rows, on_huge_pages
from fastppo.native import token_logprobs as native
from fastppo.ops import _checks
from fastppo.ops._backends import choose
from fastppo.ops._registry import custom_op, register_gradient
from fastppo.reference import token_logprobs as reference

Transform = tuple[float, float, float]  # scale, softcap or 0, temperature of the logits


class TokenLogprobs(NamedTuple):
    logprobs: Tensor
    entropy: Tensor


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    inplace_backward: bool = False,
) -> Tensor | TokenLogprobs:
    """Log-probabilities of `labels` under softmax(z), z = softcap * tanh(logits * logit_scale / softcap) / temperature.

    The log-softmax matrix is never written: one read of the logits forward, one read and one write backward.

    Args:
        logits: [..., V] float32, bfloat16 or float16 (float64 runs in the reference); any strides.
        labels: [...] int64 or int32 token ids in [0, V), or `ignore_index`.
        temperature: from 1e-10 to 1e10; divides the logits, as the sampler does.
        softcap: final logit soft-capping (Gemma 2, arXiv:2408.00118 eq. in sec. 2), from 1e-10 to 1e10, or None.
        logit_scale: from -1e10 to 1e10; multiplies the logits before everything else (Cohere, Granite).
        ignore_index: rows with this label give log-probability 0, entropy 0 and no gradient; their logits are not read.
        return_entropy: also return H = -sum_v p_v log p_v in nats.
        inplace_backward: the backward pass writes the gradient over the logits and so saves [..., V] of memory. Only for
            logits that nothing reads afterwards: neither a leaf that requires a gradient, or a view of one, nor rows that
            share memory.

    Returns:
        float32 [...] log-probabilities in nats, or `TokenLogprobs(logprobs, entropy)`. A row with NaN or +inf, or with
        nothing but -inf, gives NaN, as torch.log_softmax does. Second derivatives need float64, which the reference serves.

    Raises:
        TypeError, ValueError: wrong type, shape or device, a number or (on the CPU) a label out of range.
    """
    check_logit_options(temperature, softcap, logit_scale)
    _check_logits_and_labels(logits, labels)
    if inplace_backward and torch.is_grad_enabled() and logits.requires_grad:
        _check_overwritable(logits)
    backend = choose("token_logprobs", logits)
    if backend == "reference":
        out = reference.token_logprobs(
            logits,
            labels,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=ignore_index,
            return_entropy=return_entropy,
        )
        return TokenLogprobs(*out) if return_entropy else out
    options = (temperature, softcap or 0.0, logit_scale, ignore_index, return_entropy, inplace_backward)
    logprobs, entropy, _ = _token_logprobs(logits, labels.long(), *options, backend)
    return TokenLogprobs(logprobs, entropy) if return_entropy else logprobs


def check_logit_options(temperature: float, softcap: float | None, logit_scale: float) -> None:
    smallest, largest = _checks.SMALLEST_DIVISOR, _checks.LARGEST_FACTOR
    _checks.number("temperature", temperature, at_least=smallest, at_most=largest)
    _checks.number("logit_scale", logit_scale, at_least=-largest, at_most=largest)
    if softcap is not None:
        _checks.number("softcap", softcap, at_least=smallest, at_most=largest)


def _check_logits_and_labels(logits: Tensor, labels: Tensor) -> None:
    _checks.floating("logits", logits)
    _checks.integer("labels", labels)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits has shape {list(logits.shape)}, expected [..., V] with V >= 1")
    _checks.shape("labels", labels, logits.shape[:-1], "logits' leading shape")
    _checks.same_device("labels", labels, "logits", logits)


def _check_overwritable(logits: Tensor) -> None:
    # A compiled graph shows no leaves; what it traces are inputs and results.
    base = None if torch.compiler.is_compiling() else logits if logits._base is None else logits._base
    if base is not None and base.is_leaf:
        what = "a leaf" if base is logits else "a view of a leaf"
        raise ValueError(
            f"logits is {what} that requires a gradient, expected the result of an operation with inplace_backward=True, "
            f"which overwrites it"
        )
    reach = 1  # how many elements the dimensions of smaller strides span
    for stride, size in sorted((stride, size) for size, stride in zip(logits.shape, logits.stride(), strict=True)):
        if size > 1 and stride < reach:
            raise ValueError(
                f"logits has shape {list(logits.shape)} and strides {list(logits.stride())}, "
                f"expected elements that share no memory with inplace_backward=True"
            )
        reach += (size - 1) * stride


def _forward_kernel(
    logits: Tensor, labels: Tensor, ignore_index: int, transform: Transform, with_entropy: bool, backend: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """fp32 logprobs [...], entropy [...] or None, (max, log-sum) [..., 2]; their sum alone would lose digits."""
    rows, flat_labels = collapse_rows(logits), labels.reshape(-1).contiguous()
    if backend == "triton":
        from fastppo.kernels.token_logprobs import token_logprobs_forward as forward
    else:
        forward = native.token_logprobs_forward
    with torch.cuda.device_of(logits):
        logprobs, entropy, max_logsum = forward(rows, flat_labels, ignore_index, transform, with_entropy)
    shape = labels.shape
    return logprobs.view(shape), entropy.view(shape) if with_entropy else None, max_logsum.view(*shape, 2)


def _backward_kernel(
    logits: Tensor, labels: Tensor, ignore_index: int, transform: Transform, max_logsum: Tensor,
    entropy: Tensor, d_logprobs: Tensor, d_entropy: Tensor | None, grad: Tensor, backend: str,
) -> None:  # fmt: skip
    """Writes the gradient of the logits into `grad` [..., V], which may be `logits` itself."""
    rows = collapse_rows(logits)
    # Strides that the kernel cannot address were copied: then an in-place gradient takes the same way back.
    in_place = grad is logits and rows.data_ptr() == logits.data_ptr()
    grad_rows = rows if in_place else collapse_rows(torch.empty_like(rows) if grad is logits else grad)
    grad_rows = grad_rows.view(rows.shape)
    if backend == "triton":
        from fastppo.kernels.token_logprobs import token_logprobs_backward as backward
    else:
        backward = native.token_logprobs_backward
    flat = [None if x is None else x.reshape(-1).contiguous() for x in (labels, entropy, d_logprobs, d_entropy)]
    flat_labels, flat_entropy, flat_d_logprobs, flat_d_entropy = flat
    saved = max_logsum, flat_entropy
    with torch.cuda.device_of(logits):
        backward(rows, flat_labels, ignore_index, transform, *saved, flat_d_logprobs, flat_d_entropy, grad_rows)
    if grad is logits and not in_place:
        logits.copy_(grad_rows.view(logits.shape))


@custom_op("token_logprobs")
def _token_logprobs(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    return_entropy: bool,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    transform = (logit_scale, softcap, temperature)
    logprobs, entropy, max_logsum = _forward_kernel(logits, labels, ignore_index, transform, return_entropy, backend)
    return logprobs, logprobs.new_empty(0) if entropy is None else entropy, max_logsum


@torch.library.register_fake("fastppo::token_logprobs")
def _(logits, labels, temperature, softcap, logit_scale, ignore_index, return_entropy, inplace_backward, backend):
    logprobs = torch.empty_like(labels, dtype=torch.float32, memory_format=torch.contiguous_format)
    entropy = torch.empty_like(logprobs) if return_entropy else logprobs.new_empty(0)
    return logprobs, entropy, logprobs.new_empty((*labels.shape, 2))


@custom_op("token_logprobs_backward")
def _token_logprobs_backward(
    logits: Tensor,
    labels: Tensor,
    max_logsum: Tensor,
    entropy: Tensor,
    d_logprobs: Tensor,
    d_entropy: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    backend: str,
) -> Tensor:
    grad = on_huge_pages(torch.empty_like(logits, memory_format=torch.contiguous_format))
    transform = (logit_scale, softcap, temperature)
    upstream = max_logsum, entropy, d_logprobs, d_entropy
    _backward_kernel(logits, labels, ignore_index, transform, *upstream, grad, backend)
    return grad


@torch.library.register_fake("fastppo::token_logprobs_backward")
def _(logits, *arguments):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@custom_op("token_logprobs_backward_", mutates_args=("logits",))
def _token_logprobs_backward_(
    logits: Tensor,
    labels: Tensor,
    max_logsum: Tensor,
    entropy: Tensor,
    d_logprobs: Tensor,
    d_entropy: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    backend: str,
) -> None:
    transform = (logit_scale, softcap, temperature)
    upstream = max_logsum, entropy, d_logprobs, d_entropy
    _backward_kernel(logits, labels, ignore_index, transform, *upstream, logits, backend)


def _setup_context(ctx, inputs, outputs) -> None:
    _, entropy, max_logsum = outputs
    ctx.save_for_backward(inputs.logits, inputs.labels, max_logsum, entropy)
    ctx.options = inputs.temperature, inputs.softcap, inputs.logit_scale, inputs.ignore_index, inputs.backend
    ctx.return_entropy, ctx.inplace_backward = inputs.return_entropy, inputs.inplace_backward
    ctx.mark_non_differentiable(max_logsum)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_logprobs, d_entropy, _):
    logits, labels, max_logsum, entropy = ctx.saved_tensors
    if d_logprobs is None:
        d_logprobs = torch.zeros_like(labels, dtype=torch.float32)
    if not ctx.return_entropy:
        d_entropy = None
    arguments = (logits, labels, max_logsum, entropy, d_logprobs, d_entropy, *ctx.options)
    if not ctx.inplace_backward:
        return (_token_logprobs_backward(*arguments),)
    _token_logprobs_backward_(*arguments)
    return (logits,)


register_gradient(_token_logprobs, ("logits",), _setup_context, _backward)
