"""The PPO loss from hidden states: logits exist a chunk at a time, and gradients are made in the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.native import ppo_loss as native_loss
from fastppo.native import token_logprobs as native_logprobs
from fastppo.ops import _checks
from fastppo.ops._backends import choose
from fastppo.ops._chunked_head import ChunkedHead, check_head, kept_rows
from fastppo.ops._registry import custom_op
from fastppo.ops.ppo_loss import (
    RATIO_LEVELS,
    PPOStats,
    check_aggregation,
    check_columns,
    check_options,
    check_policy_partners,
    check_sequences,
    loss_denominator,
    named_statistics,
    needs_sequences,
    save_gradients,
    scaled_gradients,
)
from fastppo.ops.token_logprobs import check_logit_options
from fastppo.reference import linear_ppo_loss as reference


class LinearPPOLoss(NamedTuple):
    loss: Tensor
    stats: PPOStats
    logprobs: Tensor
    entropy: Tensor


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    entropy_coef: float = 0.0,
    ratio_level: str = "token",
    objective: str = "clip",
    rollout_correction: str | None = None,
    rollout_bounds: tuple[float, float] = (0.5, 2.0),
    aggregation: str = "token-mean",
    denominator: float | Tensor | None = None,
) -> LinearPPOLoss:
    """`ppo_loss`, without its value term, of the log-probabilities of `labels` under logits hidden @ weight.T + bias.

    Logits exist for a chunk of rows at a time, in fp32 with fp32 accumulation whatever the inputs are. While they do,
    their share of the gradients of hidden, weight and bias is computed: 6 N H V flops and no second look (8 with
    ratio_level="sequence", where a first pass finds the sequences' ratios). Extra memory: one chunk (about 32 MiB) and
    the fp32 gradients. Masked and ignored rows are left out altogether; a frozen hidden or weight costs no product.

    Args:
        hidden: [..., H] float32, bfloat16 or float16 (float64 runs in the reference): [N, H],
            packed [total, H] or [B, T, H].
        weight: [V, H], the head; bias: [V] or None. Any of those types.
        labels: [...] int64 or int32 token ids in [0, V), or `ignore_index`, which is as good as masked.
        old_logprobs, advantages, mask, ref_logprobs, rollout_logprobs: [...], as for `ppo_loss`.
        temperature, softcap, logit_scale: as for `token_logprobs`.
        cu_seqlens and all other options: as for `ppo_loss`. The entropy of the bonus is that of the same logits.

    Returns:
        LinearPPOLoss(loss, stats, logprobs, entropy): 0-d float32 loss, `PPOStats` (value fields 0), and float32 [...]
        log-probabilities and entropies in nats for logging: detached, 0 where masked or ignored.

    Raises:
        TypeError, ValueError: wrong type, shape, device or range, a missing partner, or (on the CPU) a label out of
        range.
    """
    _checks.choice("ratio_level", ratio_level, RATIO_LEVELS)
    coefficients = (0.0, kl_coef, kl_kind, entropy_coef)
    options = native_loss.PPOOptions(
        clip_low, clip_high, dual_clip, None, *coefficients, objective, rollout_correction, rollout_bounds
    )
    columns = {
        "old_logprobs": old_logprobs,
        "advantages": advantages,
        "ref_logprobs": ref_logprobs,
        "rollout_logprobs": rollout_logprobs,
    }
    columns = {name: x for name, x in columns.items() if x is not None}
    check_options(options)
    check_logit_options(temperature, softcap, logit_scale)
    check_head(hidden, weight, bias, labels)
    check_columns(columns, mask, "labels", labels)
    check_policy_partners(columns, options)
    denominator = check_aggregation(aggregation, denominator, hidden)
    check_sequences(cu_seqlens, labels, needs_sequences(ratio_level, aggregation, denominator))
    head = [x for x in (hidden, weight, bias) if x is not None]
    if choose("linear_ppo_loss", *head, *columns.values()) == "reference":
        loss, stats, logprobs, entropy = reference.linear_ppo_loss(
            hidden,
            weight,
            labels,
            **columns,
            mask=mask,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=ignore_index,
            **options._asdict(),
            cu_seqlens=cu_seqlens,
            ratio_level=ratio_level,
            aggregation=aggregation,
            denominator=denominator,
        )
        return LinearPPOLoss(loss, named_statistics(stats), logprobs, entropy)
    wanted = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in (hidden, weight, bias)]
    loss, stats, _, logprobs, entropy, *_ = _linear_ppo_loss(
        hidden,
        weight,
        labels.long(),
        old_logprobs,
        advantages,
        mask,
        bias,
        ref_logprobs,
        rollout_logprobs,
        cu_seqlens,
        denominator,
        temperature,
        softcap or 0.0,
        logit_scale,
        ignore_index,
        clip_low,
        clip_high,
        dual_clip,
        kl_coef,
        kl_kind,
        entropy_coef,
        objective,
        rollout_correction,
        *rollout_bounds,
        ratio_level,
        aggregation,
        wanted,
    )
    return LinearPPOLoss(loss, PPOStats(*stats.unbind()), logprobs, entropy)


class _Chunk(NamedTuple):
    sums: Tensor
    logprobs: Tensor
    entropy: Tensor


def _chunk_loss(
    logits: Tensor,
    labels: Tensor,
    transform: tuple[float, float, float],
    columns: dict[str, Tensor],
    options: native_loss.PPOOptions,
    with_gradient: bool,
) -> _Chunk:
    """The loss of a chunk of rows, none of them ignored; with_gradient overwrites their logits by its gradient."""
    no_index = -1
    logprobs, entropy, max_logsum = native_logprobs.token_logprobs_forward(
        logits[None], labels, no_index, transform, True
    )
    columns = columns | {"logprobs": logprobs, "entropy": entropy}
    wanted = ("logprobs", "entropy") if options.entropy_coef != 0 else ("logprobs",)
    sums, gradients = native_loss.ppo_loss_tokens(columns, None, options, wanted if with_gradient else ())
    if with_gradient:
        upstream = gradients["logprobs"], gradients.get("entropy")
        native_logprobs.token_logprobs_backward(
            logits[None], labels, no_index, transform, max_logsum, entropy, *upstream, logits[None]
        )
    return _Chunk(sums, logprobs, entropy)


@custom_op("linear_ppo_loss")
def _linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    cu_seqlens: Tensor | None,
    denominator: Tensor | None,
    temperature: float,
    softcap: float,
    logit_scale: float,
    ignore_index: int,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    kl_coef: float,
    kl_kind: str,
    entropy_coef: float,
    objective: str,
    rollout_correction: str | None,
    rollout_low: float,
    rollout_high: float,
    ratio_level: str,
    aggregation: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, statistics, scale, log-probs, entropies, gradients of hidden, weight and bias before that scale, each empty where not `wanted`)."""
    coefficients, rollout_bounds = (0.0, kl_coef, kl_kind, entropy_coef), (rollout_low, rollout_high)
    options = native_loss.PPOOptions(
        clip_low, clip_high, dual_clip, None, *coefficients, objective, rollout_correction, rollout_bounds
    )
    transform = (logit_scale, softcap, temperature)
    keep = kept_rows(labels, mask, len(weight), ignore_index)
    rows = keep.reshape(-1).nonzero().squeeze(1)
    kept_labels = labels.reshape(-1)[rows]
    head = ChunkedHead(hidden, weight, bias, rows, wanted)
    logprobs, entropy = (torch.zeros(labels.shape, dtype=torch.float32) for _ in range(2))
    by_sequence = ratio_level == "sequence"
    # Under autocast the products would be rounded to half precision.
    with torch.autocast("cpu", enabled=False):
        if by_sequence:
            for places, logits in head.chunks():
                values, *_ = native_logprobs.token_logprobs_forward(
                    logits[None], kept_labels[places], -1, transform, False
                )
                logprobs.view(-1)[rows[places]] = values
        made, used_sequences = {}, None
        if needs_sequences(ratio_level, aggregation, denominator):
            sequence_columns = {"logprobs": logprobs, "old_logprobs": old_logprobs.contiguous()}
            needed = {"with_weights": aggregation == "seq-mean-token-mean", "with_log_ratios": by_sequence}
            sequences = native_loss.ppo_loss_sequences(sequence_columns, keep.contiguous(), cu_seqlens, **needed)
            made, used_sequences = sequences.columns(), sequences.used
        given = {"old_logprobs": old_logprobs, "advantages": advantages, "ref_logprobs": ref_logprobs}
        given |= {"rollout_logprobs": rollout_logprobs} | made
        columns = {name: x.reshape(-1)[rows] for name, x in given.items() if x is not None}
        sums = [logprobs.new_empty((0, len(native_loss.PPO_SUMS)))]
        for places, logits in head.chunks():
            in_chunk = {name: x[places] for name, x in columns.items()}
            chunk = _chunk_loss(logits, kept_labels[places], transform, in_chunk, options, any(wanted))
            logprobs.view(-1)[rows[places]], entropy.view(-1)[rows[places]] = chunk.logprobs, chunk.entropy
            sums.append(chunk.sums)
            if any(wanted):
                head.add_gradients(places, logits)
    result = native_loss.ppo_loss_finish(
        torch.cat(sums), options, loss_denominator(denominator, aggregation, used_sequences)
    )
    return *result, logprobs, entropy, *head.gradients


@torch.library.register_fake("fastppo::linear_ppo_loss")
def _(hidden, weight, labels, old_logprobs, advantages, mask, bias, *options):
    *_, wanted = options
    loss = hidden.new_empty((), dtype=torch.float32)
    logprobs, entropy = loss.new_empty(labels.shape), loss.new_empty(labels.shape)
    sources = zip((hidden, weight, bias), wanted, strict=True)
    gradients = [loss.new_empty(x.shape if want else 0) for x, want in sources]
    scale = loss.new_empty((), dtype=torch.float64)
    return loss, loss.new_empty(len(PPOStats._fields)), scale, logprobs, entropy, *gradients


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, _, _, _, _, bias, *_, wanted = inputs
    _, _, scale, _, _, *gradients = output
    save_gradients(ctx, (hidden, weight, bias), scale, gradients, wanted)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, d_loss, *_):
    grads = [None] * 28
    grads[0], grads[1], grads[6] = scaled_gradients(ctx, d_loss)
    return tuple(grads)


torch.library.register_autograd("fastppo::linear_ppo_loss", _backward, setup_context=_setup_context)
