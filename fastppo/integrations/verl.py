"""verl's functions on our ops, under its names and with its parameters, dtypes and results.

Masks are of any type and hold 0 and 1. What ours does not take raises TypeError or ValueError before anything is written, and `patch()`
leaves it to verl: a mask that weighs, a gradient for what a loss takes as constant, a sharded vocabulary, tensors of another class.

Where a result of verl's is NaN that need not be, ours is the number: no token to average over gives 0, and what is not finite under a
mask, or a logit of -inf, reaches nothing. `strict=True` refuses those inputs, so that a patched call gets verl's own NaN.

All is computed in fp32 (fp64 for fp64) and rounded once to verl's dtype. At a tie of two loss terms the whole gradient is the unclipped
one's, where verl halves it.

Of verl's policy losses these are left as they are: gpg, which is a product and a sum already, and dppo_tv, dppo_kl, sapo, geo_mean, dro,
clip_cov and kl_cov, which `fastppo.ppo_loss` does not express; bypass_mode calls vanilla, and so ours. There is no estimator of our name
beside "gae": verl gives estimators of other names neither values nor gamma.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastppo import ops
from fastppo.integrations.masks import selecting
from fastppo.integrations.patching import Patch, Peer, Replacement
from fastppo.integrations.verl_aggregation import aggregate, aggregation_of, loss_dtype, mean_dtype, promoted
from fastppo.ops import _checks
from fastppo.ops.masked_whiten import moments_inside, whitened

NO_LABEL = -(2**62)  # no row is left out
KL_KINDS = {"kl": "k1", "mse": "k2", "mse+": "k2", "k2+": "k2", "low_var_kl": "k3", "kl+": "k1+", "low_var_kl+": "k3+"}


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probability of each label: logits [..., V], labels [...] -> [...] in the logits' type, computed in fp32.

    Where verl takes flash-attention's cross-entropy (on a GPU that has it), the result is fp32, the label -100 gives 0, and
    `inplace_backward` writes the gradient over the logits. Elsewhere verl does none of these, and neither do we.
    """
    _check_plain(logits=logits, labels=labels)
    flash = _takes_flash_attention(logits)
    logprobs = ops.token_logprobs(
        logits, labels, ignore_index=-100 if flash else NO_LABEL, inplace_backward=inplace_backward and flash
    )
    return logprobs if flash else logprobs.to(logits.dtype)


def entropy_from_logits(logits: Tensor, *, strict: bool = False) -> Tensor:
    """Entropy of each row in nats: logits [..., V] -> [...] in the logits' type, computed in fp32."""
    _check_plain(logits=logits)
    if strict:
        _refuse_infinite(logits=logits)
    return _entropy(logits).to(logits.dtype)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048, *, strict: bool = False) -> Tensor:
    """Entropy of each row in nats, in fp32: logits [N, V] -> [N]. No chunk is needed, as nothing of the logits' size is made."""
    _check_plain(logits=logits)
    _checks.integer_number("chunk_size", chunk_size, at_least=1)
    if logits.dim() != 2:
        raise ValueError(f"logits has shape {list(logits.shape)}, expected [N, V]")
    if strict:
        _refuse_infinite(logits=logits)
    return _entropy(logits.float() if logits.dtype == torch.float64 else logits)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | None = 1.0,
    reduction: str | None = "none",
    dist_process_group: object | None = None,
) -> tuple[Tensor, Tensor]:
    """fp32 log-probabilities of the labels [N] (or their sum or mean, by `reduction`) and entropies [N].

    hidden [..., H] and weight [V, H], labels of N elements. Of any H, where verl's kernel needs a multiple of 128, and on the CPU too.
    """
    _check_plain(hidden=hidden, weight=weight, labels=labels)
    if dist_process_group is not None:
        raise ValueError(
            f"dist_process_group is {dist_process_group!r}, expected None: the whole vocabulary on each rank"
        )
    _checks.choice("reduction", reduction, ("none", "sum", "mean"))
    logprobs, entropy = _head(hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), temperature)
    if reduction != "none":
        logprobs = logprobs.sum() if reduction == "sum" else logprobs.mean()
    return logprobs, entropy.float()


class FusedLinearForPPO(nn.Module):
    """Log-probabilities (fp32) and entropies (hidden's type) of hidden [N, H] or [B, T, H]; logits are never rounded below fp32.

    `chunk_size` sizes nothing here, and both of `impl_backend` are the same, but that Liger's knows the label -100: log-probability 0.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        _checks.choice("impl_backend", impl_backend, ("torch", "liger"))
        self.chunk_size, self.impl_backend = chunk_size, impl_backend

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        _check_plain(hidden_states=hidden_states, vocab_weights=vocab_weights, input_ids=input_ids)
        if hidden_states.dim() not in (2, 3):
            raise ValueError(f"hidden_states has shape {list(hidden_states.shape)}, expected [N, H] or [B, T, H]")
        ignored = -100 if self.impl_backend == "liger" else NO_LABEL
        logprobs, entropy = _head(hidden_states, vocab_weights, input_ids, temperature, ignored)
        return logprobs, entropy.to(hidden_states.dtype)


def compute_gae_advantage_return(
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float,
    lam: float,
    *,
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """Advantages, whitened by those inside the mask, and returns: [B, T] each, without gradients.

    A masked step has the advantage of the next step inside the mask, 0 where there is none, before whitening.
    """
    _check_plain(token_level_rewards=token_level_rewards, values=values)
    keep = _kept(response_mask)
    if strict:
        _refuse_faults(keep, token_level_rewards=token_level_rewards, values=values)
    dtype = promoted(token_level_rewards, values, response_mask)
    with torch.no_grad():
        advantages, returns = ops.gae(token_level_rewards, values, keep, gamma=gamma, lam=lam)
        advantages = _carried_back(advantages, keep)
        returns = torch.where(keep, returns, advantages + values)
        return _whitened(advantages, keep, shift_mean=True).to(dtype), returns.to(dtype)


def compute_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    cliprange: float | None = None,
    cliprange_low: float | None = None,
    cliprange_high: float | None = None,
    clip_ratio_c: float = 3.0,
    loss_agg_mode: str = "token-mean",
    *,
    strict: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, clipped share, mean of old_log_prob - log_prob, share bounded by clip_ratio_c) of the dual-clipped objective."""
    low = cliprange if cliprange_low is None else cliprange_low
    high = cliprange if cliprange_high is None else cliprange_high
    tokens = _Tokens(old_log_prob, log_prob, advantages, response_mask)
    loss, stats = _policy_loss(
        tokens, {"loss_agg_mode": loss_agg_mode}, strict, clip_low=low, clip_high=high, dual_clip=clip_ratio_c
    )
    # Unlike the statistics it has a gradient.
    ppo_kl = ops.masked_mean((_wide(old_log_prob) - _wide(log_prob)).clamp(-20, 20), _kept(response_mask))
    share = mean_dtype(stats.clipfrac, response_mask)
    ppo_kl = ppo_kl.to(mean_dtype(old_log_prob, log_prob, response_mask))
    return loss, stats.clipfrac.to(share), ppo_kl, stats.clipfrac_dual.to(share)


def compute_policy_loss_vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    *,
    strict: bool = False,
) -> tuple[Tensor, dict[str, Any]]:
    """The clipped objective, bounded by clip_ratio_c where the advantage is negative. `rollout_is_weights` are above 0."""
    tokens = _Tokens(old_log_prob, log_prob, advantages, response_mask, rollout_is_weights)
    options = {**_clip_range(config), "dual_clip": config.get("clip_ratio_c", 3.0)}
    loss, stats = _policy_loss(tokens, _aggregated_by(config, loss_agg_mode), strict, **options)
    return loss, _metrics(stats.clipfrac, stats.ppo_kl, stats.clipfrac_dual)


def compute_policy_loss_gspo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    *,
    strict: bool = False,
) -> tuple[Tensor, dict[str, Any]]:
    """The clipped objective of the sequence's ratio. `rollout_is_weights` are above 0, and the ratios below exp(10)."""
    tokens = _Tokens(old_log_prob, log_prob, advantages, response_mask, rollout_is_weights)
    options = {**_clip_range(config), "ratio_level": "sequence"}
    loss, stats = _policy_loss(tokens, _aggregated_by(config, loss_agg_mode), strict, **options)
    if not stats.ratio_max < 22026:
        raise ValueError(
            f"a sequence's ratio is {stats.ratio_max.item()}, expected less than exp(10), where verl cuts it"
        )
    ppo_kl = ops.masked_mean(_wide(old_log_prob) - _wide(log_prob.detach()), _kept(response_mask))  # not clamped here
    return loss, _metrics(stats.clipfrac, ppo_kl, stats.clipfrac_dual)


def compute_policy_loss_cispo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
    *,
    strict: bool = False,
) -> tuple[Tensor, dict[str, Any]]:
    """-A clip(ratio) log_prob, the clipped ratio without a gradient."""
    tokens = _Tokens(old_log_prob, log_prob, advantages, response_mask, rollout_is_weights)
    options = {**_clip_range(config), "objective": "cispo"}
    loss, stats = _policy_loss(tokens, _aggregated_by(config, loss_agg_mode), strict, **options)
    return loss, _metrics(stats.clipfrac, stats.ppo_kl, stats.clipfrac_dual)


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
    *,
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """(0.5 max((v - R)^2, (clip(v, old +- cliprange_value) - R)^2) aggregated, share of clipped tokens)."""
    _check_plain(vpreds=vpreds, returns=returns, values=values)
    _refuse_gradients(returns=returns, values=values)
    keep = _kept(response_mask)
    if strict:
        _refuse_faults(keep, vpreds=vpreds, returns=returns, values=values)
    aggregation = aggregation_of(keep, loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    no_policy = torch.zeros_like(vpreds, dtype=torch.float32, requires_grad=False)
    critic = {"values": vpreds, "old_values": values, "returns": returns, "value_clip": cliprange_value, "vf_coef": 1.0}
    loss, stats = ops.ppo_loss(no_policy, no_policy, no_policy, keep, **critic, **aggregation)
    share = stats.value_clipfrac.to(mean_dtype(stats.value_clipfrac, response_mask))
    return loss.to(loss_dtype(loss_agg_mode, vpreds, returns, values, response_mask)), share


def agg_loss(
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
    *,
    strict: bool = False,
) -> Tensor:
    """The tokens' losses [B, T] as one number, 0-d."""
    _check_plain(loss_mat=loss_mat)
    keep = _kept(loss_mask)
    if strict:
        _refuse_faults(keep, loss_mat=loss_mat)
    aggregation = aggregation_of(keep, loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    return aggregate(loss_mat, keep, **aggregation).to(loss_dtype(loss_agg_mode, loss_mat, loss_mask))


def compute_entropy_loss(
    logits: Tensor, response_mask: Tensor, loss_agg_mode: str = "token-mean", *, strict: bool = False
) -> Tensor:
    """The entropies of logits [B, T, V], aggregated; rows under the mask are not read."""
    _check_plain(logits=logits)
    keep = _kept(response_mask)
    if strict:
        _refuse_infinite(logits=logits)
        _refuse_faults(keep)
    loss = aggregate(_entropy(logits, keep), keep, **aggregation_of(keep, loss_agg_mode))
    return loss.to(loss_dtype(loss_agg_mode, logits, response_mask))


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """Estimates of KL(policy, reference), elementwise: kl or k1, abs, mse or k2, low_var_kl or k3.

    With "+", that value and k2's gradient ("abs+" is left to verl).
    """
    _check_plain(logprob=logprob, ref_logprob=ref_logprob)
    if not isinstance(kl_penalty, str):
        raise TypeError(f"kl_penalty is {kl_penalty!r}, expected a string")
    kind = KL_KINDS.get(kl_penalty, kl_penalty)
    if kind in ("k1", "abs"):  # one operation of torch, and so as exact and as fast
        difference = logprob - ref_logprob
        return difference if kind == "k1" else difference.abs()
    return ops.approx_kl(logprob, ref_logprob, kind).to(promoted(logprob, ref_logprob))


def kl_penalty_forward(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """`kl_penalty` without the kinds that end in "+"."""
    if isinstance(kl_penalty, str) and kl_penalty.endswith("+"):
        raise ValueError(f"kl_penalty is {kl_penalty!r}, expected a kind without +")
    return _kl_penalty(logprob, ref_logprob, kl_penalty)


_kl_penalty = kl_penalty  # which a parameter above hides


def masked_mean(values: Tensor, mask: Tensor, axis: int | tuple[int, ...] | None = None) -> Tensor:
    """The mean of all elements inside the mask, 0-d; 0 where there is none. Means along an axis are left to verl."""
    _check_plain(values=values)
    if axis is not None:
        raise ValueError(f"axis is {axis!r}, expected None")
    return ops.masked_mean(values, _kept(mask)).to(mean_dtype(values, mask))


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(values - mean) / sqrt(variance + 1e-8) everywhere, by the statistics inside the mask, without a gradient."""
    _check_plain(values=values)
    _refuse_gradients(values=values)
    return _whitened(values, _kept(mask), shift_mean).to(values.dtype)


class _Tokens(NamedTuple):
    """What a policy loss reads, [B, T] each."""

    old_log_prob: Tensor
    log_prob: Tensor
    advantages: Tensor
    response_mask: Tensor
    rollout_is_weights: Tensor | None = None


def _policy_loss(tokens: _Tokens, aggregated: dict[str, Any], strict: bool, **options: Any) -> ops.PPOLoss:
    """The loss in verl's dtype, and the statistics."""
    given = {name: x for name, x in tokens._asdict().items() if x is not None}
    _check_plain(**given)
    _refuse_gradients(**{name: x for name, x in given.items() if name != "log_prob"})
    keep = _kept(tokens.response_mask)
    if strict:
        _refuse_faults(keep, **{name: x for name, x in given.items() if name != "response_mask"})
    advantages = tokens.advantages
    if tokens.rollout_is_weights is not None:
        advantages = _weighed(advantages, tokens.rollout_is_weights, keep, linear=options.get("objective") == "cispo")
    columns = (tokens.log_prob, tokens.old_log_prob, advantages, keep)
    loss, stats = ops.ppo_loss(*columns, **aggregation_of(keep, **aggregated), **options)
    return ops.PPOLoss(loss.to(loss_dtype(aggregated["loss_agg_mode"], *given.values())), stats)


def _weighed(advantages: Tensor, weights: Tensor, keep: Tensor, linear: bool) -> Tensor:
    """A loss term is as many times as large by an advantage that is; but of a clipped one, only where the sign stays."""
    _checks.shape("rollout_is_weights", weights, advantages.shape, "advantages' shape")
    if not linear and not ((weights > 0) | ~keep).all():
        raise ValueError("rollout_is_weights has 0, a negative number or NaN inside the mask, expected numbers > 0")
    return _wide(advantages) * weights


def _clip_range(config: Any) -> dict[str, float]:
    if not hasattr(config, "clip_ratio"):
        raise TypeError(f"config is {type(config).__name__}, expected an actor's config")
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return {
        "clip_low": config.clip_ratio if low is None else low,
        "clip_high": config.clip_ratio if high is None else high,
    }


def _aggregated_by(config: Any, loss_agg_mode: str) -> dict[str, Any]:
    return {"loss_agg_mode": loss_agg_mode, **config.global_batch_info}


def _metrics(clipfrac: Tensor, ppo_kl: Tensor, clipfrac_lower: Tensor) -> dict[str, float]:
    return {
        "actor/pg_clipfrac": clipfrac.item(),
        "actor/ppo_kl": ppo_kl.item(),
        "actor/pg_clipfrac_lower": clipfrac_lower.item(),
    }


def _entropy(logits: Tensor, keep: Tensor | None = None) -> Tensor:
    """fp32 [...] (fp64 for fp64), 0 in rows that are not kept."""
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    if keep is not None:
        _checks.shape("response_mask", keep, labels.shape, "logits' leading shape")
        labels = labels.masked_fill(~keep, NO_LABEL)
    return ops.token_logprobs(logits, labels, ignore_index=NO_LABEL, return_entropy=True).entropy


def _head(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, ignored: int = NO_LABEL
) -> ops.TokenLogprobs:
    options = {"temperature": temperature, "ignore_index": ignored, "return_entropy": True}
    logprobs, entropy = ops.linear_token_logprobs(hidden, weight, labels, **options)
    return ops.TokenLogprobs(logprobs.float(), entropy)


def _carried_back(advantages: Tensor, keep: Tensor) -> Tensor:
    """At each masked step, the advantage of the next step inside the mask, as verl's recursion leaves it there."""
    steps = keep.shape[1]
    if not (keep[:, 1:] & ~keep[:, :-1]).any():
        return advantages  # nothing is kept after a masked step: they have their 0 already
    places = torch.where(keep, torch.arange(steps, device=keep.device), steps)
    following = places.flip(1).cummin(1).values.flip(1)
    return nn.functional.pad(advantages, (0, 1)).gather(1, following)


def _whitened(values: Tensor, keep: Tensor, shift_mean: bool) -> Tensor:
    with torch.no_grad():
        moments = moments_inside(values, keep)
        if moments[0] < 2:
            raise ValueError(f"the mask keeps {int(moments[0])} elements, expected at least 2 to whiten by")
        return whitened(values, None, moments, shift_mean)


def _takes_flash_attention(logits: Tensor) -> bool:
    """Whether verl's own logprobs_from_logits would be flash-attention's for these."""
    theirs = sys.modules.get("verl.utils.torch_functional")
    found = getattr(theirs, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", False)
    return logits.is_cuda and found and os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") != "1"


def _check_plain(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if type(x) not in (Tensor, nn.Parameter):  # DTensor, nested tensors
            raise TypeError(f"{name} is {type(x).__name__}, expected a plain torch.Tensor")


def _kept(mask: Tensor) -> Tensor:
    _check_plain(mask=mask)
    return selecting("the mask", mask)


def _refuse_gradients(**constants: Tensor) -> None:
    for name, x in constants.items():
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, expected a constant: ours gives it none")


def _refuse_faults(keep: Tensor, **tensors: Tensor) -> None:
    if not keep.any():
        raise ValueError("the mask keeps nothing, expected a token: strict=True leaves the result to verl")
    _refuse_infinite(**{f"{name} under the mask": torch.where(keep, 0, x) for name, x in tensors.items()})


def _refuse_infinite(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if not x.isfinite().all():
            raise ValueError(f"{name} is not finite, expected finite numbers: strict=True leaves the result to verl")


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(torch.float32, x.dtype))


NAME = "fastppo"  # of the vanilla loss, in the table that verl's `policy_loss.loss_mode` looks into
CORE, TORCH = "verl.trainer.ppo.core_algos", "verl.utils.torch_functional"
VANILLA = Replacement(f"{CORE}:compute_policy_loss_vanilla", compute_policy_loss_vanilla)
REPLACEMENTS = (
    Replacement(f"{TORCH}:logprobs_from_logits", logprobs_from_logits),
    Replacement(f"{TORCH}:entropy_from_logits", entropy_from_logits),
    Replacement(f"{TORCH}:entropy_from_logits_with_chunking", entropy_from_logits_with_chunking),
    Replacement(f"{TORCH}:masked_mean", masked_mean),
    Replacement(f"{TORCH}:masked_whiten", masked_whiten),
    Replacement(
        "verl.utils.kernel.linear_cross_entropy:linear_cross_entropy",
        linear_cross_entropy,
        signature="verl.utils.kernel.linear_cross_entropy:LinearCrossEntropy.forward",
    ),
    Replacement("verl.utils.experimental.torch_functional:FusedLinearForPPO.forward", FusedLinearForPPO.forward),
    Replacement(f"{CORE}:compute_gae_advantage_return", compute_gae_advantage_return),
    Replacement(f"{CORE}:compute_policy_loss", compute_policy_loss),
    VANILLA,
    Replacement(f"{CORE}:compute_policy_loss_gspo", compute_policy_loss_gspo),
    Replacement(f"{CORE}:compute_policy_loss_cispo", compute_policy_loss_cispo),
    Replacement(f"{CORE}:compute_value_loss", compute_value_loss),
    Replacement(f"{CORE}:agg_loss", agg_loss),
    Replacement(f"{CORE}:compute_entropy_loss", compute_entropy_loss),
    Replacement(f"{CORE}:kl_penalty", kl_penalty),
    Replacement(f"{CORE}:kl_penalty_forward", kl_penalty_forward),
)


class _Verl(Peer):
    """verl, whose table of policy losses has ours under a name of its own too."""

    def patch(self, strict: bool = False) -> Patch:
        """As `Peer.patch`, in this process: verl's workers are others. `loss_mode=fastppo` is the vanilla loss too."""
        patch = super().patch(strict)
        core = import_module(CORE)
        core.POLICY_LOSS_REGISTRY.setdefault(NAME, core.compute_policy_loss_vanilla)
        return patch

    def unpatch(self) -> None:
        core = sys.modules.get(CORE)
        if core is not None and core.POLICY_LOSS_REGISTRY.get(NAME) is core.compute_policy_loss_vanilla:
            del core.POLICY_LOSS_REGISTRY[NAME]
        super().unpatch()

    def register(self) -> None:
        """Without a patch: `policy_loss.loss_mode=fastppo` is our vanilla loss, and all else verl's own."""
        self._tested_version()
        import_module(CORE).POLICY_LOSS_REGISTRY[NAME] = self._find(VANILLA, strict=False).ours


_PEER = _Verl("verl", "verl", {"0.9": REPLACEMENTS})
patch, unpatch, register = _PEER.patch, _PEER.unpatch, _PEER.register
