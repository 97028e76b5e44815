"""The one place that turns tensors into pointers, sizes and strides for `fastppo._C`.

Callers (`fastppo/ops/`) have checked shapes, types and devices; these functions allocate the outputs and make the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

unavailable_reason: str | None = None
try:
    # After torch: the extension then shares the OpenMP runtime, and so the thread pool, that torch has loaded.
    from fastppo import _C
except ImportError as error:
    _C = None
    missing = "No module named" in str(error) or "cannot import name" in str(error)
    unavailable_reason = (
        "the C++ kernels are not built: install a C++17 compiler and install fastppo again"
        if missing
        else f"the C++ kernels do not load: {error}"
    )


def cpu_isa() -> str:
    """Instruction set that the C++ kernels use here: `avx512`, `avx2`, `plain`, or `none` when they are not built.

    `FASTPPO_ISA` lowers it, for tests and comparisons.
    """
    return _C.cpu_isa() if _C is not None else "none"


def threads() -> int:
    return torch.get_num_threads()


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def collapse_rows(x: Tensor) -> Tensor:
    """View of `x` [..., width] as [outer, inner, width] with last stride 1; a copy only where no such view exists."""
    width = x.shape[-1]
    if x.numel() == 0:
        return x.new_empty((0, 1, width))
    if x.stride(-1) != 1 and width > 1:
        x = x.contiguous()
    lead = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size != 1]
    merged: list[tuple[int, int]] = []
    for size, stride in lead:
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return x.contiguous().view(1, -1, width)
    merged = [(1, 0)] * (2 - len(merged)) + merged
    (outer, stride_outer), (inner, stride_inner) = merged
    return x.as_strided((outer, inner, width), (stride_outer, stride_inner, 1))


def rows(x: Tensor) -> tuple[int, int, int, int, int, int, int]:
    """`x` [outer, inner, width] as the bindings' description of strided rows."""
    outer, inner, width = x.shape
    return (x.data_ptr(), DTYPE_CODES[x.dtype], outer, inner, width, x.stride(0), x.stride(1))


def label_error(labels: Tensor, position: int, vocabulary: int, ignore_index: int) -> ValueError:
    """What is wrong with the label at flat `position`."""
    return ValueError(
        f"labels holds {labels.reshape(-1)[position].item()} at flat position {position}, "
        f"expected 0 <= label < {vocabulary} or ignore_index = {ignore_index}"
    )


def token_logprobs_forward(
    logits: Tensor, labels: Tensor, ignore_index: int, transform: tuple[float, float, float], with_entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """logits [outer, inner, V] with last stride 1, labels int64 [outer * inner] -> fp32 logprobs, entropy, (max, log-sum).

    transform: (scale, softcap or 0, temperature).
    """
    logprobs = torch.empty(labels.shape, dtype=torch.float32)
    entropy = torch.empty_like(logprobs) if with_entropy else None
    max_logsum = torch.empty((len(labels), 2), dtype=torch.float32)
    bad = _C.token_logprobs_forward(
        rows(logits), address(labels), ignore_index, transform,
        address(logprobs), address(entropy), address(max_logsum), threads(),
    )  # fmt: skip
    if bad >= 0:
        raise label_error(labels, bad, logits.shape[-1], ignore_index)
    return logprobs, entropy, max_logsum


def token_logprobs_add_tile(
    tile: Tensor, labels: Tensor, transform: tuple[float, float, float], with_entropy: bool, state: Tensor
) -> None:
    """Adds fp32 columns [rows, width] to `state`, fp64 [rows, 4]: max z, sum exp(z - max), the same times z - max, label's z.

    labels int64 [rows] count from the tile's first column. Everything contiguous; `state` starts as (-inf, 0, 0, 0).
    """
    count, width = tile.shape
    _C.token_logprobs_add_tile(
        address(tile), address(labels), count, width, transform, with_entropy, address(state), threads()
    )


def token_logprobs_backward(
    logits: Tensor, labels: Tensor, ignore_index: int, transform: tuple[float, float, float], max_logsum: Tensor,
    entropy: Tensor | None, d_logprobs: Tensor, d_entropy: Tensor | None, grad: Tensor,
) -> None:  # fmt: skip
    """Writes the gradient of logits [outer, inner, V] into `grad`: contiguous rows, or the logits themselves.

    A label outside [0, V) that is not `ignore_index` stands in columns that these logits do not hold.
    """
    _C.token_logprobs_backward(
        rows(logits), address(labels), ignore_index, transform, address(max_logsum), address(entropy),
        address(d_logprobs), address(d_entropy), address(grad), threads(),
    )  # fmt: skip


def sample_tokens(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
    sequence_ids: Tensor, positions: Tensor, seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """logits [B, V], the rest [B] -> tokens int64 [B]; log-probs, processed log-probs and kept mass fp32 [B]."""
    tokens = torch.empty(logits.shape[0], dtype=torch.int64)
    floats = [torch.empty(logits.shape[0], dtype=torch.float32) for _ in range(3)]
    parameters = [x.contiguous() for x in (temperature, top_k, top_p, min_p, sequence_ids, positions)]
    view = collapse_rows(logits)
    _C.sample_tokens(rows(view), *map(address, parameters), seed, address(tokens), *map(address, floats), threads())
    return tokens, *floats


def decode_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_table: Tensor, context_lens: Tensor,
    scale: float, softcap: float, window: int, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """q [B, Hq, D] with its last two dimensions contiguous, caches contiguous, int32 tables -> [B, Hq, Dv] in q's dtype."""
    batch, heads, head_size = q.shape
    pages, page_size, kv_heads, value_size = v_pages.shape
    out = torch.empty((batch, heads, value_size), dtype=q.dtype)
    bad = _C.decode_attention(
        address(q), address(k_pages), address(v_pages), address(block_table), address(context_lens), address(sinks),
        address(out), DTYPE_CODES[q.dtype], batch, heads, kv_heads, pages, page_size, block_table.shape[1], q.stride(0),
        head_size, value_size, scale, softcap, window, threads(),
    )  # fmt: skip
    if bad >= 0:
        used = -(-int(context_lens[bad]) // page_size)
        raise ValueError(
            f"context_lens[{bad}] is {int(context_lens[bad])} and block_table[{bad}] begins {block_table[bad, :used].tolist()}, "
            f"expected a length in [0, {block_table.shape[1] * page_size}] and pages in [0, {pages})"
        )
    return out


def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """k, v [T, Hkv, D] whose last two dimensions are contiguous, into contiguous caches of the same dtype; slots int64 [T]."""
    size = k.element_size()
    bad = _C.write_kv(
        address(k), address(v), address(k_pages), address(v_pages), address(slots), len(slots), k_pages.shape[0],
        k_pages.shape[1], k.stride(0) * size, v.stride(0) * size, k[0].numel() * size, v[0].numel() * size,
    )  # fmt: skip
    if bad >= 0:
        places = k_pages.shape[0] * k_pages.shape[1]
        raise ValueError(f"slots[{bad}] is {int(slots[bad])}, expected less than the cache's {places} places")


PPO_COLUMNS = (
    "logprobs", "old_logprobs", "advantages", "values", "old_values", "returns",
    "ref_logprobs", "entropy", "rollout_logprobs", "weights", "sequence_log_ratios",
)  # fmt: skip
PPO_SUMS = (
    "policy_loss", "value_loss", "kl_loss", "entropy_bonus", "entropy", "approx_kl", "ppo_kl", "clipfrac",
    "clipfrac_dual", "value_clipfrac", "ratio_mean", "kl_ref", "rollout_weight_mean", "rollout_clipfrac", "ratio_max",
)  # fmt: skip
KL_KINDS = ("k1", "k2", "k3", "abs", "k1+", "k3+")  # in the order of csrc/ops.h's KLKind
ROLLOUT_CORRECTIONS = (None, "truncate", "mask")  # in the order of csrc/ops.h's RolloutCorrection


class PPOOptions(NamedTuple):
    """What `fastppo.ops.ppo_loss` documents, as the kernels take it."""

    clip_low: float
    clip_high: float
    dual_clip: float | None
    value_clip: float | None
    vf_coef: float
    kl_coef: float
    kl_kind: str
    entropy_coef: float
    objective: str
    rollout_correction: str | None
    rollout_bounds: tuple[float, float]

    def numbers(self, scale: float) -> list[float]:
        return [
            scale, 1 - self.clip_low, 1 + self.clip_high, self.dual_clip or 0.0, self.value_clip or 0.0,
            self.vf_coef, self.kl_coef, self.entropy_coef, *self.rollout_bounds,
        ]  # fmt: skip

    def choices(self) -> list[int]:
        correction = ROLLOUT_CORRECTIONS.index(self.rollout_correction)
        return [KL_KINDS.index(self.kl_kind), correction, self.objective == "cispo"]


class PPOCounts(NamedTuple):
    tokens: int  # unmasked tokens
    sequences: int  # sequences that have any
    weights: Tensor | None  # fp32 [N]: 1 / unmasked tokens of the token's sequence
    log_ratios: Tensor | None  # fp32 [N]: mean log-ratio of the token's sequence

    def columns(self) -> dict[str, Tensor]:
        made = {"weights": self.weights, "sequence_log_ratios": self.log_ratios}
        return {name: x for name, x in made.items() if x is not None}


def ppo_tokens(columns: dict[str, Tensor], mask: Tensor | None) -> tuple[list[tuple[int, int]], int, int]:
    """Contiguous columns of one shape, bool mask of that shape -> the bindings' description of them."""
    described = [
        (address(columns.get(name)), DTYPE_CODES[columns[name].dtype] if name in columns else 0) for name in PPO_COLUMNS
    ]
    return described, address(mask), columns["logprobs"].numel()


def ppo_loss_sequences(
    columns: dict[str, Tensor], mask: Tensor | None, cu_seqlens: Tensor | None,
    *, with_weights: bool = False, with_log_ratios: bool = False,
) -> PPOCounts:  # fmt: skip
    """Sequences are rows of [B, T] columns, or ranges of packed ones; tokens of any other shape make one sequence."""
    shape = columns["logprobs"].shape
    total = shape.numel()
    weights = torch.empty(total, dtype=torch.float32) if with_weights else None
    log_ratios = torch.empty(total, dtype=torch.float32) if with_log_ratios else None
    offsets = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    count, length = (1, total) if len(shape) != 2 else shape
    if offsets is not None:
        count, length = offsets.numel() - 1, 0
    tokens, sequences, bad = _C.ppo_loss_sequences(
        ppo_tokens(columns, mask), address(offsets), count, length, address(weights), address(log_ratios), threads()
    )
    if bad >= 0:
        raise ValueError(
            f"cu_seqlens holds {offsets[bad].item()} at position {bad}, "
            f"expected offsets that start at 0, never fall and end at {total}"
        )
    return PPOCounts(tokens, sequences, weights, log_ratios)


def ppo_loss_tokens(
    columns: dict[str, Tensor], mask: Tensor | None, options: PPOOptions, scale: float, wanted: Sequence[str]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """(sums over the unmasked tokens, fp32 gradients of the `wanted` columns times `scale`)."""
    gradients = {name: torch.empty(columns[name].shape, dtype=torch.float32) for name in wanted}
    sums = _C.ppo_loss_tokens(
        ppo_tokens(columns, mask), options.numbers(scale), options.choices(),
        *(address(gradients.get(name)) for name in ("logprobs", "values", "entropy")), threads(),
    )  # fmt: skip
    return dict(zip(PPO_SUMS, sums, strict=True)), gradients


def steps(x: Tensor | None) -> tuple[int, int, int, int]:
    """`x` [B, T], or [total] of packed tokens, as the bindings' description of strided steps; zeros for None."""
    if x is None:
        return (0, 0, 0, 0)
    stride_sequence, stride_step = (0, x.stride(0)) if x.dim() == 1 else x.stride()
    return (x.data_ptr(), DTYPE_CODES.get(x.dtype, 0), stride_sequence, stride_step)


def sequences(x: Tensor, offsets: Tensor | None) -> tuple[int, int, int]:
    """How the tokens of `x` divide into sequences: rows of [B, T], or [total] cut at int64 `offsets` [B + 1]."""
    if offsets is None:
        return (0, *x.shape)
    tokens, count = x.shape[0], offsets.shape[0] - 1
    bad = _C.first_bad_offset(address(offsets), count, tokens)
    if bad >= 0:
        raise ValueError(
            f"cu_seqlens holds {offsets[bad].item()} at position {bad}, "
            f"expected 0 first, no decrease and {tokens} (all tokens) last"
        )
    return (address(offsets), count, 0)


def as_offsets(cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.long().contiguous()


def place_in_sequences(position: int, offsets: Tensor) -> tuple[int, int]:
    """(sequence, step in it) of a flat position in packed tokens."""
    sequence = int(torch.searchsorted(offsets, position, right=True)) - 1
    return sequence, position - int(offsets[sequence])


def flat_float(x: Tensor) -> Tensor:
    """`x` as contiguous fp32; itself where it is that already."""
    return x.float().contiguous()


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor | None, dones: Tensor | None, truncated: Tensor | None,
    next_values: Tensor | None, cu_seqlens: Tensor | None, decays: Tensor | None, gamma: float, decay: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(advantages, returns), fp32 in values' shape, [B, T] or packed [total]; all inputs where they lie.

    next_values: [B] or values' shape. decays: fp32 [B], gamma * lambda of each sequence; None: `decay` for all.
    """
    offsets = as_offsets(cu_seqlens)
    shape = sequences(values, offsets)
    each_step = next_values is not None and next_values.shape == values.shape
    bootstrap = None if next_values is None or each_step else flat_float(next_values)
    if truncated is not None and not each_step:
        bad = _C.first_unbootstrapped_truncation(steps(mask), steps(dones), steps(truncated), shape)
        if bad >= 0:
            row, step = divmod(bad, values.shape[1]) if offsets is None else place_in_sequences(bad, offsets)
            raise ValueError(
                f"truncated is set at step {step} of sequence {row}, which is not its last unmasked step; expected "
                "next_values with the value after every step (values' shape), not one value a sequence"
            )
        truncated = None  # the last step bootstraps from `bootstrap` anyway
    advantages, returns = (torch.empty(values.shape, dtype=torch.float32) for _ in range(2))
    _C.gae(
        steps(rewards), steps(values), steps(next_values if each_step else None),
        steps(mask), steps(dones), steps(truncated), address(bootstrap), address(decays),
        gamma, decay, shape, address(advantages), address(returns), threads(),
    )  # fmt: skip
    return advantages, returns


def masked_moments(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sum of squared deviations (fp64 0-d) of the elements of `x` where `mask` (same shape) is set."""
    x, mask = flat_float(x), None if mask is None else mask.contiguous()
    moments = _C.masked_moments(address(x), address(mask), x.numel(), threads())
    return tuple(torch.tensor(moment, dtype=torch.float64) for moment in moments)


def masked_whiten(
    x: Tensor, mask: Tensor | None, count: Tensor, mean: Tensor, squares: Tensor, keep_mean: bool
) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8), plus the mean with `keep_mean`; fp32 in the shape of `x`, 0 where masked."""
    x, mask = flat_float(x), None if mask is None else mask.contiguous()
    out = torch.empty(x.shape, dtype=torch.float32)
    moments = (count.item(), mean.item(), squares.item())
    _C.masked_whiten(address(x), address(mask), x.numel(), moments, keep_mean, address(out), threads())
    return out


def approx_kl(logprobs: Tensor, ref_logprobs: Tensor, kind: int) -> Tensor:
    """KL estimate of each element, fp32 in the shape of `logprobs`; `kind` is a place in KL_KINDS."""
    logprobs, ref_logprobs = flat_float(logprobs), flat_float(ref_logprobs)
    kl = torch.empty(logprobs.shape, dtype=torch.float32)
    _C.approx_kl(address(logprobs), address(ref_logprobs), kl.numel(), kind, address(kl), threads())
    return kl


def approx_kl_backward(logprobs: Tensor, ref_logprobs: Tensor, d_kl: Tensor, kind: int) -> Tensor:
    """fp32 gradient of `logprobs`; that of `ref_logprobs` is its negative."""
    logprobs, ref_logprobs, d_kl = flat_float(logprobs), flat_float(ref_logprobs), flat_float(d_kl)
    grad = torch.empty(logprobs.shape, dtype=torch.float32)
    _C.approx_kl_backward(
        address(logprobs), address(ref_logprobs), address(d_kl), grad.numel(), kind, address(grad), threads()
    )
    return grad


def kl_shaped_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, cu_seqlens: Tensor | None,
    coef: float, kind: int,
) -> Tensor:  # fmt: skip
    """-coef * kl at masked-in tokens plus scores [B] at each sequence's last of them; fp32 in logprobs' shape."""
    offsets = as_offsets(cu_seqlens)
    shape = sequences(logprobs, offsets)
    scores, logprobs, ref_logprobs = flat_float(scores), flat_float(logprobs), flat_float(ref_logprobs)
    mask = mask.contiguous()
    rewards = torch.empty(logprobs.shape, dtype=torch.float32)
    _C.kl_shaped_rewards(
        address(scores), address(logprobs), address(ref_logprobs), address(mask), shape,
        coef, kind, address(rewards), threads(),
    )  # fmt: skip
    return rewards
