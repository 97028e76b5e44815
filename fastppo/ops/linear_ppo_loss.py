"""The PPO loss from hidden states: logits exist a chunk at a time, and gradients are made in the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.native import ppo_loss as native_loss
from fastppo.ops import _checks
from fastppo.ops._backends import choose
from fastppo.ops._head import (
    Head,
    HeadGradients,
    Statistics,
    Upstream,
    WholeRows,
    check_head,
    exact_products,
    kept_rows,
    lift_for,
)
from fastppo.ops._registry import custom_op, register_gradient
from fastppo.ops.ppo_loss import (
    RATIO_LEVELS,
    PPOStats,
    check_aggregation,
    check_columns,
    check_policy_partners,
    check_sequences,
    checked_codes,
    loss_denominator,
    named_statistics,
    needs_sequences,
    refuse_wrong_offsets,
    save_gradients,
    scaled_gradients,
)
from fastppo.ops.token_logprobs import Transform, check_logit_options
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
    codes = checked_codes(options)
    check_logit_options(temperature, softcap, logit_scale)
    check_head(hidden, weight, bias, labels)
    check_columns(columns, mask, "labels", labels)
    check_policy_partners(columns, options)
    denominator = check_aggregation(aggregation, denominator, hidden)
    check_sequences(cu_seqlens, labels, needs_sequences(ratio_level, aggregation, denominator))
    head = [x for x in (hidden, weight, bias) if x is not None]
    backend = choose("linear_ppo_loss", *head, *columns.values())
    if backend == "reference":
        if cu_seqlens is not None:
            _checks.offsets_in_order("cu_seqlens", cu_seqlens, labels.numel())
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
        *codes,
        ratio_level,
        aggregation,
        wanted,
        backend,
    )
    return LinearPPOLoss(loss, PPOStats(*stats.unbind()), logprobs, entropy)


class _Loss(NamedTuple):
    """The loss over tokens, whose sums are added up part by part."""

    options: native_loss.PPOCodes
    columns: dict[str, Tensor]
    """fp32 [count], of the rows that are multiplied."""
    labels: Tensor
    mask: Tensor | None
    sums: list[Tensor]
    """fp32 [parts, 16] of each part, as `native_loss.ppo_loss_tokens` makes them."""

    def add(self, part: slice, statistics: Statistics, with_gradient: bool) -> Upstream | None:
        """Adds a part's sums; with_gradient returns what its logits' gradients need."""
        columns = {name: x[part] for name, x in self.columns.items()}
        columns |= {"logprobs": statistics.logprobs, "entropy": statistics.entropy}
        entropy_coef = native_loss.PPONumbers(*self.options.numbers).entropy_coef
        wanted = ("logprobs", "entropy") if entropy_coef != 0 else ("logprobs",)
        mask = None if self.mask is None else self.mask[part]
        sums, gradients = native_loss.ppo_loss_tokens(columns, mask, self.options, wanted if with_gradient else ())
        self.sums.append(sums)
        if not with_gradient:
            return None
        entropy = statistics.entropy if "entropy" in gradients else None
        upstream = entropy, gradients["logprobs"], gradients.get("entropy")
        return Upstream(self.labels[part], statistics.max_logsum, *upstream)


def _gradient_dtype(x: Tensor, backend: str) -> torch.dtype:
    """Of what waits for the loss's own gradient: fp32, or bf16, which has its range and whose factor is 1 but for scaling."""
    return torch.bfloat16 if backend == "triton" and x.dtype == torch.bfloat16 else torch.float32


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
    numbers: Sequence[float],
    choices: Sequence[int],
    ratio_level: str,
    aggregation: str,
    wanted: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, statistics, scale, log-probs, entropies, gradients of hidden, weight and bias before that scale, each empty where not `wanted`)."""
    options = native_loss.PPOCodes(numbers, choices)
    transform = (logit_scale, softcap, temperature)
    keep = kept_rows(labels, mask, len(weight), ignore_index, backend)
    head = Head(hidden, weight, bias, keep, backend)
    kept_labels = head.labels(labels)
    by_sequence = ratio_level == "sequence"
    with exact_products(hidden):
        rows = WholeRows(head, any(wanted))
        logprobs = old_logprobs  # for the counts alone, but for a ratio of sequences
        if by_sequence:
            logprobs = head.put(_row_logprobs(rows, kept_labels, transform))
        made, used_sequences = {}, None
        if needs_sequences(ratio_level, aggregation, denominator):
            sequence_columns = {"logprobs": logprobs.contiguous(), "old_logprobs": old_logprobs.contiguous()}
            needed = {"with_weights": aggregation == "seq-mean-token-mean", "with_log_ratios": by_sequence}
            sequences = native_loss.ppo_loss_sequences(sequence_columns, keep.contiguous(), cu_seqlens, **needed)
            made, used_sequences = sequences.columns(), sequences.used
        else:
            refuse_wrong_offsets(cu_seqlens, labels.numel())
        given = {"old_logprobs": old_logprobs, "advantages": advantages, "ref_logprobs": ref_logprobs}
        given |= {"rollout_logprobs": rollout_logprobs} | made
        columns = {name: head.take(x.reshape(labels.shape)) for name, x in given.items() if x is not None}
        no_sums = torch.empty((0, len(native_loss.PPO_SUMS)), dtype=torch.float32, device=hidden.device)
        loss = _Loss(options, columns, kept_labels, head.mask, [no_sums])
        sources = zip((hidden, weight, bias), wanted, strict=True)
        dtypes = [_gradient_dtype(x, backend) if want else None for x, want in sources]
        logprobs, entropy, gradients = _loss_and_gradients(head, rows, loss, transform, dtypes)
    d_hidden, d_weight, d_bias = (hidden.new_empty(0, dtype=torch.float32) if x is None else x for x in gradients)
    d_hidden = d_hidden.view(hidden.shape) if wanted[0] else d_hidden
    outputs = head.put(logprobs), head.put(entropy), d_hidden, d_weight, d_bias
    divisor = loss_denominator(denominator, aggregation, used_sequences)
    return *native_loss.ppo_loss_finish(torch.cat(loss.sums), options, divisor), *outputs


def _row_logprobs(rows: WholeRows, labels: Tensor, transform: Transform) -> Tensor:
    logprobs = torch.empty_like(labels, dtype=torch.float32)
    for part in rows.parts(slice(0, len(labels))):
        logprobs[part] = rows.statistics(rows.logits(part), labels[part], transform, False).logprobs
    return logprobs


def _loss_and_gradients(
    head: Head, rows: WholeRows, loss: _Loss, transform: Transform, dtypes: Sequence[torch.dtype | None]
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """(log-probs, entropies) of the rows that are multiplied and the three gradients, of the types that are not None."""
    # The token losses' gradients are of the size of the advantages: about 1.
    lift = (
        lift_for(torch.ones((), dtype=torch.float32, device=loss.labels.device))
        if head.dtype == torch.float16
        else None
    )
    gradients = HeadGradients(head, dtypes, lift)
    logprobs, entropy = (torch.empty_like(loss.labels, dtype=torch.float32) for _ in range(2))
    with_gradient = any(dtype is not None for dtype in dtypes)
    for chunk in rows.chunks():
        d_logits = rows.gradients(chunk)
        for part in rows.parts(chunk):
            logits = rows.logits(part)
            statistics = rows.statistics(logits, loss.labels[part], transform, True)
            logprobs[part], entropy[part], _ = statistics
            upstream = loss.add(part, statistics, with_gradient)
            if with_gradient:
                inside = slice(part.start - chunk.start, part.stop - chunk.start)
                rows.differentiate(logits, upstream.lifted(lift), transform, [x[inside] for x in d_logits])
        if with_gradient:
            inputs = head.inputs(chunk)
            for (block, weight), gradient in zip(rows.blocks(), d_logits, strict=True):
                gradients.add(chunk, block, weight, inputs, gradient)
    return logprobs, entropy, gradients.finish()


@torch.library.register_fake("fastppo::linear_ppo_loss")
def _(hidden, weight, labels, old_logprobs, advantages, mask, bias, *options):
    *_, wanted, backend = options
    loss = hidden.new_empty((), dtype=torch.float32)
    logprobs, entropy = loss.new_empty(labels.shape), loss.new_empty(labels.shape)
    sources = zip((hidden, weight, bias), wanted, strict=True)
    gradients = [
        loss.new_empty(x.shape, dtype=_gradient_dtype(x, backend)) if want else loss.new_empty(0) for x, want in sources
    ]
    scale = loss.new_empty((), dtype=torch.float64)
    return loss, loss.new_empty(len(PPOStats._fields)), scale, logprobs, entropy, *gradients


def _setup_context(ctx, inputs, outputs) -> None:
    _, _, scale, _, _, *gradients = outputs
    save_gradients(ctx, (inputs.hidden, inputs.weight, inputs.bias), scale, gradients, inputs.wanted)
    ctx.mark_non_differentiable(*outputs[1:])


register_gradient(_linear_ppo_loss, ("hidden", "weight", "bias"), _setup_context, scaled_gradients)
