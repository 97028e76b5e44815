"""The PPO loss in all its variants, its statistics and its gradients, from token inputs that are read once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.native import as_offsets, on_cuda
from fastppo.native import ppo_loss as native
from fastppo.ops import _checks
from fastppo.ops._backends import choose
from fastppo.ops._numbers import filled
from fastppo.ops._registry import custom_op, register_gradient
from fastppo.reference import ppo_loss as reference

RATIO_LEVELS = ("token", "sequence")
OBJECTIVES = ("clip", "cispo")
_PLAIN_TYPES = frozenset((float, int, str, type(None)))  # equal ones mean the same; of bool and int they do not
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "fixed-denominator")


class PPOStats(NamedTuple):
    """0-d float32 tensors, detached; 0 where what they need was not given, or where no token is unmasked.

    The three losses are aggregated like the loss and come without their coefficients: over micro-batches that share a
    `denominator` they add up. All others but `tokens` and `ratio_max` are means over the `tokens` unmasked tokens,
    whatever the aggregation: a minibatch's are sum(mean * tokens) / sum(tokens) over its micro-batches.
    """

    policy_loss: Tensor
    value_loss: Tensor
    """With its factor 0.5."""
    kl_loss: Tensor
    """The KL term of `kl_kind`."""
    entropy: Tensor
    approx_kl: Tensor
    """0.5 (logprob - old_logprob)^2 (TRL's approxkl); log-ratios are clamped to +-20 here and below."""
    ppo_kl: Tensor
    """old_logprob - logprob (verl's ppo_kl)."""
    clipfrac: Tensor
    """Share of tokens whose clipped loss exceeds the unclipped one; with cispo, whose ratio is out of the range."""
    clipfrac_dual: Tensor
    """Share of tokens that dual_clip bounds."""
    value_clipfrac: Tensor
    """Share of tokens whose clipped value loss exceeds the unclipped one."""
    ratio_mean: Tensor
    """The ratio of the objective: the token's, or with ratio_level="sequence" its sequence's."""
    ratio_max: Tensor
    kl_ref: Tensor
    """k3 estimate of KL(policy, reference)."""
    rollout_weight_mean: Tensor
    """exp(old_logprob - rollout_logprob), before truncation or masking."""
    rollout_clipfrac: Tensor
    """Share of tokens whose weight was truncated or masked."""
    tokens: Tensor
    """Number of unmasked tokens."""


class PPOLoss(NamedTuple):
    loss: Tensor
    stats: PPOStats


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    value_clip: float | None = None,
    vf_coef: float = 0.5,
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    entropy_coef: float = 0.0,
    ratio_level: str = "token",
    objective: str = "clip",
    rollout_correction: str | None = None,
    rollout_bounds: tuple[float, float] = (0.5, 2.0),
    aggregation: str = "token-mean",
    denominator: float | Tensor | None = None,
) -> PPOLoss:
    """policy + vf_coef * value + kl_coef * KL - entropy_coef * entropy, each term aggregated over the unmasked tokens.

    Token terms, with r = exp(logprob - old_logprob), the log-ratio clamped to +-20:

    - policy: max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) (Schulman et al. 2017, arXiv:1707.06347).
    - value: 0.5 max((v - R)^2, (clip(v, old_value +- value_clip) - R)^2), where `values` are given.
    - KL: an estimate of KL(policy, reference), where `ref_logprobs` are given (see `approx_kl`).
    - entropy, where it is given.

    Gradients flow to logprobs, values and entropy; all else is constant. At a tie of a max or min the gradient is the
    unclipped term's, and at a clamp's bound it flows. A term whose coefficient is 0 is left out. Second derivatives
    are not implemented (use float64: the reference).

    Args:
        logprobs, old_logprobs, advantages: of one shape, float32, bfloat16 or float16 in any mix (float64 runs in the
            reference), any strides: padded [B, T], packed [total] with `cu_seqlens`, or any shape where no sequence
            matters.
        mask: bool, that shape; True where a token counts. What stands elsewhere, NaN too, reaches neither loss nor
            statistics nor gradients. None: every token counts.
        values, old_values, returns: that shape; old_values only matter with `value_clip`.
        ref_logprobs, entropy, rollout_logprobs: that shape. Without a coefficient or correction they are only measured.
        cu_seqlens: int32 [B + 1] (or int64), the bounds of packed sequences; empty ones are allowed. Sequences matter
            for ratio_level="sequence", for "seq-mean-token-mean", and for "seq-mean-token-sum" without a denominator;
            they are the rows of [B, T] where it is not given. Wrong ones raise on the CPU; on a GPU they give NaN where
            sequences matter.
        clip_low, clip_high: >= 0, widths of the clip range; a clip_low of 1 or more never bites.
        dual_clip: > 1, bounds the policy term by -A dual_clip where A < 0 (Ye et al. 2020, arXiv:1912.09729), or None.
        value_clip: > 0, or None for the plain squared error.
        vf_coef, kl_coef, entropy_coef: >= 0.
        kl_kind: k1, k2, k3, abs, k1+ or k3+ ("+": that value with k2's gradient).
        ratio_level: "token", or "sequence" for exp(mean log-ratio of the sequence) with each token's own gradient
            (GSPO-token, arXiv:2507.18071, eq. 13).
        objective: "clip", or "cispo" for -A sg[clip(r)] logprob (MiniMax-M1, arXiv:2506.13585).
        rollout_correction: weighs the policy term by w = exp(old_logprob - rollout_logprob), the mismatch of sampler
            and trainer: "truncate" (TIS) cuts w at the upper bound, "mask" drops the term where w is outside the
            bounds (the token still counts in denominators).
        rollout_bounds: (low, high) of w, both inclusive.
        aggregation: "token-mean" = sum / unmasked tokens; "seq-mean-token-sum" = sum / sequences with an unmasked
            token; "seq-mean-token-mean" = sum of the sequences' means / such sequences; "fixed-denominator" = sum /
            denominator.
        denominator: > 0, a number or a 0-d tensor (on the device, never synchronised), replaces the aggregation's own.
            With the minibatch's denominator for each of its micro-batches, their losses and gradients add up to the
            minibatch's, however it is split (by whole sequences for "seq-mean-token-mean" and ratio_level="sequence").

    Returns:
        PPOLoss(loss, stats): 0-d float32 loss, `PPOStats`. An empty mask gives 0 for everything, with zero gradients.

    Raises:
        TypeError, ValueError: wrong type, shape, device or range, or a missing partner (values without returns, ...).
    """
    columns = {
        "logprobs": logprobs,
        "old_logprobs": old_logprobs,
        "advantages": advantages,
        "values": values,
        "old_values": old_values,
        "returns": returns,
        "ref_logprobs": ref_logprobs,
        "entropy": entropy,
        "rollout_logprobs": rollout_logprobs,
    }
    columns = {name: x for name, x in columns.items() if x is not None}
    _checks.choice("ratio_level", ratio_level, RATIO_LEVELS)
    clips, coefficients = (clip_low, clip_high, dual_clip, value_clip), (vf_coef, kl_coef, kl_kind, entropy_coef)
    options = native.PPOOptions(*clips, *coefficients, objective, rollout_correction, rollout_bounds)
    codes = checked_codes(options)
    check_columns(columns, mask, "logprobs", logprobs)
    _check_partners(columns, options)
    denominator = check_aggregation(aggregation, denominator, logprobs)
    check_sequences(cu_seqlens, logprobs, needs_sequences(ratio_level, aggregation, denominator))
    if choose("ppo_loss", *columns.values()) == "reference":
        if cu_seqlens is not None:
            _checks.offsets_in_order("cu_seqlens", cu_seqlens, logprobs.numel())
        loss, stats = reference.ppo_loss(
            **columns,
            mask=mask,
            cu_seqlens=cu_seqlens,
            **options._asdict(),
            ratio_level=ratio_level,
            aggregation=aggregation,
            denominator=denominator,
        )
        return PPOLoss(loss, named_statistics(stats))
    wanted = [
        x is not None and coefficient != 0 and x.requires_grad and torch.is_grad_enabled()
        for x, coefficient in ((logprobs, 1.0), (values, vf_coef), (entropy, entropy_coef))
    ]
    loss, stats, *_ = _ppo_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        values,
        old_values,
        returns,
        ref_logprobs,
        entropy,
        rollout_logprobs,
        cu_seqlens,
        denominator,
        *codes,
        ratio_level,
        aggregation,
        wanted,
    )
    return PPOLoss(loss, PPOStats(*stats.unbind()))


def checked_codes(options: native.PPOOptions) -> native.PPOCodes:
    """The codes of options that are right; they are looked up where all are plain numbers and names that were right before."""
    plain = not torch.compiler.is_compiling() and type(options.rollout_bounds) is tuple
    if plain and _PLAIN_TYPES.issuperset(map(type, options[:-1] + options.rollout_bounds)):
        return _remembered_codes(options)
    _check_options(options)
    return options.codes()


@lru_cache(maxsize=64)
def _remembered_codes(options: native.PPOOptions) -> native.PPOCodes:
    _check_options(options)
    return options.codes()


def _check_options(options: native.PPOOptions) -> None:
    for name in ("clip_low", "clip_high", "vf_coef", "kl_coef", "entropy_coef"):
        _checks.number(name, getattr(options, name), at_least=0)
    if options.dual_clip is not None:
        _checks.number("dual_clip", options.dual_clip, above=1)
    if options.value_clip is not None:
        _checks.number("value_clip", options.value_clip, above=0)
    _checks.choice("kl_kind", options.kl_kind, native.KL_KINDS)
    _checks.choice("objective", options.objective, OBJECTIVES)
    _checks.choice("rollout_correction", options.rollout_correction, native.ROLLOUT_CORRECTIONS)
    if options.objective == "cispo" and options.dual_clip is not None:
        raise ValueError(
            f"dual_clip is {options.dual_clip!r}, expected None with objective='cispo', whose weight is clipped already"
        )
    if not isinstance(options.rollout_bounds, tuple | list) or len(options.rollout_bounds) != 2:
        raise TypeError(f"rollout_bounds is {options.rollout_bounds!r}, expected (low, high)")
    low = _checks.number("rollout_bounds[0]", options.rollout_bounds[0], at_least=0)
    _checks.number("rollout_bounds[1]", options.rollout_bounds[1], above=0, at_least=low)


def check_columns(columns: dict[str, Tensor], mask: Tensor | None, like_name: str, like: Tensor) -> None:
    """Every column is floating and the mask boolean, with the shape and device of `like`."""
    if all(_checks.fits(x, _checks.FLOATING, like) for x in columns.values()):
        if mask is None or _checks.fits(mask, (torch.bool,), like):
            return
    for name, x in columns.items():
        _checks.floating(name, x)
    if mask is not None:
        _checks.mask("mask", mask)
    for name, x in {**columns, "mask": like if mask is None else mask}.items():
        _checks.shape(name, x, like.shape, f"{like_name}' shape")
        _checks.same_device(name, x, like_name, like)


def check_needed(columns: dict[str, Tensor], name: str, partner: str, value: object = "given") -> None:
    if name not in columns:
        raise ValueError(f"{name} is None, expected a tensor because {partner} is {value}")


def _check_partners(columns: dict[str, Tensor], options: native.PPOOptions) -> None:
    for name, partner in (("values", "returns"), ("returns", "values"), ("old_values", "values")):
        if name in columns:
            check_needed(columns, partner, name)
    if "values" in columns and options.value_clip is not None:
        check_needed(columns, "old_values", "value_clip", options.value_clip)
    if options.entropy_coef != 0:
        check_needed(columns, "entropy", "entropy_coef", options.entropy_coef)
    check_policy_partners(columns, options)


def check_policy_partners(columns: dict[str, Tensor], options: native.PPOOptions) -> None:
    if options.kl_coef != 0:
        check_needed(columns, "ref_logprobs", "kl_coef", options.kl_coef)
    if options.rollout_correction is not None:
        check_needed(columns, "rollout_logprobs", "rollout_correction", options.rollout_correction)


def check_aggregation(aggregation: str, denominator: float | Tensor | None, like: Tensor) -> Tensor | None:
    """The denominator as a 0-d tensor: its value is data, for which nothing recompiles."""
    _checks.choice("aggregation", aggregation, AGGREGATIONS)
    if denominator is None:
        if aggregation == "fixed-denominator":
            raise ValueError(
                "denominator is None, expected a number or 0-d tensor with aggregation='fixed-denominator'"
            )
        return None
    if isinstance(denominator, Tensor):
        _checks.shape("denominator", denominator, (), "a number")
        return denominator.detach()
    return filled((), _checks.number("denominator", denominator, above=0), torch.float64, like.device)


def needs_sequences(ratio_level: str, aggregation: str, denominator: Tensor | None) -> bool:
    counts_sequences = aggregation == "seq-mean-token-sum" and denominator is None
    return ratio_level == "sequence" or aggregation == "seq-mean-token-mean" or counts_sequences


def check_sequences(cu_seqlens: Tensor | None, tokens: Tensor, needed: bool) -> None:
    """Packed tokens with offsets, or [B, T] where sequences are needed. `refuse_wrong_offsets` is for their values."""
    if cu_seqlens is None:
        if needed and tokens.dim() != 2:
            raise ValueError(
                f"cu_seqlens is None, expected int32 [B + 1] for packed tokens of shape {list(tokens.shape)} "
                f"(or tokens [B, T])"
            )
        return
    _checks.integer("cu_seqlens", cu_seqlens)
    _checks.same_device("cu_seqlens", cu_seqlens, "the tokens", tokens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens has shape {list(cu_seqlens.shape)}, expected [B + 1]")
    if tokens.dim() != 1:
        raise ValueError(
            f"cu_seqlens is given with tokens of shape {list(tokens.shape)}, expected packed tokens [total]"
        )


def refuse_wrong_offsets(cu_seqlens: Tensor | None, tokens: int) -> None:
    """ValueError on the CPU, also where no sequence matters; a GPU, which the host does not wait for, then does not look."""
    if cu_seqlens is not None and not on_cuda(cu_seqlens):
        as_offsets(cu_seqlens, tokens)


def named_statistics(stats: dict[str, Tensor]) -> PPOStats:
    """The reference's statistics, and 0 for those it has none of."""
    zero = torch.zeros_like(stats["tokens"])
    return PPOStats(*(stats.get(name, zero) for name in PPOStats._fields))


def loss_denominator(denominator: Tensor | None, aggregation: str, used_sequences: Tensor | None) -> Tensor | None:
    """What the sums are divided by; None: the number of unmasked tokens."""
    return used_sequences if denominator is None and aggregation.startswith("seq-") else denominator


@custom_op("ppo_loss")
def _ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    rollout_logprobs: Tensor | None,
    cu_seqlens: Tensor | None,
    denominator: Tensor | None,
    numbers: Sequence[float],
    choices: Sequence[int],
    ratio_level: str,
    aggregation: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, statistics, scale, gradients of logprobs, values and entropy before that scale, each empty where not `wanted`)."""
    options = native.PPOCodes(numbers, choices)
    given = (logprobs, old_logprobs, advantages, values, old_values, returns, ref_logprobs, entropy, rollout_logprobs)
    columns = {name: x.contiguous() for name, x in zip(native.PPO_COLUMNS, given, strict=False) if x is not None}
    mask = None if mask is None else mask.contiguous()
    used_sequences = None
    if needs_sequences(ratio_level, aggregation, denominator):
        needed = {"with_weights": aggregation == "seq-mean-token-mean", "with_log_ratios": ratio_level == "sequence"}
        sequences = native.ppo_loss_sequences(columns, mask, cu_seqlens, **needed)
        columns |= sequences.columns()
        used_sequences = sequences.used
    else:
        refuse_wrong_offsets(cu_seqlens, logprobs.numel())
    names = ("logprobs", "values", "entropy")
    sums, gradients = native.ppo_loss_tokens(
        columns, mask, options, [name for name, want in zip(names, wanted, strict=True) if want]
    )
    result = native.ppo_loss_finish(sums, options, loss_denominator(denominator, aggregation, used_sequences))
    return *result, *(gradients[name] if name in gradients else sums.new_empty(0) for name in names)


@torch.library.register_fake("fastppo::ppo_loss")
def _(logprobs, old_logprobs, advantages, mask, values, *options):
    *_, wanted = options
    loss = logprobs.new_empty((), dtype=torch.float32)
    gradients = [loss.new_empty(logprobs.shape if want else 0) for want in wanted]
    return loss, loss.new_empty(len(PPOStats._fields)), loss.new_empty((), dtype=torch.float64), *gradients


@custom_op("scale_gradients")
def scale_gradients(
    first: Tensor, second: Tensor, third: Tensor, d_loss: Tensor, scale: Tensor, dtypes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Three gradients (empty: none) times d_loss * scale, each rounded once to its type, a place in native.DTYPES."""
    return tuple(native.scale_gradients((first, second, third), d_loss, scale, dtypes))


@torch.library.register_fake("fastppo::scale_gradients")
def _(first, second, third, d_loss, scale, dtypes):
    gradients = (first, second, third)
    return tuple(torch.empty_like(x, dtype=native.DTYPES[code]) for x, code in zip(gradients, dtypes, strict=True))


def save_gradients(
    ctx, sources: Sequence[Tensor | None], scale: Tensor, gradients: Sequence[Tensor], wanted: Sequence[bool]
) -> None:
    """For `scaled_gradients`: of each of three inputs, its gradient before the loss' own and whether it is wanted."""
    ctx.wanted = tuple(wanted)
    ctx.dtypes = [native.DTYPES.index(x.dtype) for x, want in zip(sources, wanted, strict=True) if want]
    ctx.save_for_backward(scale, *(x for x, want in zip(gradients, wanted, strict=True) if want))
    ctx.set_materialize_grads(False)


def scaled_gradients(ctx, d_loss: Tensor | None, *_: None) -> list[Tensor | None]:
    """The gradients of the three inputs, None where there is none."""
    if d_loss is None:
        return [None] * 3
    scale, *gradients = ctx.saved_tensors
    if on_cuda(scale):
        empty = [scale.new_empty(0, dtype=torch.float32)] * (3 - len(gradients))
        scaled = scale_gradients(*gradients, *empty, d_loss, scale, ctx.dtypes + [0] * len(empty))
    else:  # torch's own products: nothing to hide from a compiler
        scaled = native.scale_gradients(gradients, d_loss, scale, ctx.dtypes)
    found = iter(scaled)
    return [next(found) if want else None for want in ctx.wanted]


def _setup_context(ctx, inputs, outputs) -> None:
    _, _, scale, *gradients = outputs
    save_gradients(ctx, (inputs.logprobs, inputs.values, inputs.entropy), scale, gradients, inputs.wanted)
    ctx.mark_non_differentiable(*outputs[1:])


register_gradient(_ppo_loss, ("logprobs", "values", "entropy"), _setup_context, scaled_gradients)
