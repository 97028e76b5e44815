"""OpenRLHF 0.11 on our ops: the functions of `openrlhf.models.utils`, the two losses of `openrlhf.models.loss`, and the advantages and
returns of its experience maker, each under its own name and with its own signature.

`patch()` works on the process that calls it: OpenRLHF trains in Ray's worker processes, each of which has to call it.

Where a place is masked, theirs multiplies by 0, so that NaN or infinity there makes the result NaN; ours selects. An empty mask makes their
means NaN; ours are 0. `strict=True` brings both back. Gradients flow only to `log_probs` and `values`: other inputs that require one are
refused. At an exact tie of a minimum or maximum theirs gives each side half of the gradient, ours all of it to the unclipped side.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from fastppo.integrations.masks import binary
from fastppo.integrations.patching import Patch, Peer, Replacement
from fastppo.ops import _checks, approx_kl, gae, masked_mean, ppo_loss, token_logprobs
from fastppo.reference.approx_kl import with_gradient_of

MAX_KL = 10.0
MAX_IMPORTANCE_WEIGHT = 10.0  # of the unbiased gradient of the KL
MAX_LOG_RATIO = 20.0


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0, *, strict: bool = False) -> Tensor:
    """Log-probabilities of `labels` [...] under softmax(logits / temperature), in the type of logits [..., V].

    Theirs divides the logits in place; ours leaves them alone, but for `strict`. A label of -100 gives 0 without a gradient, as theirs does
    with flash-attn; without it theirs fails. A row with +inf gives NaN, where theirs gives -inf to all other labels.
    """
    if strict and temperature != 1.0:
        with torch.no_grad():  # whatever it refuses, it refuses before the logits are written
            token_logprobs(logits, labels, temperature=temperature)
        logits, temperature = logits.div_(temperature), 1.0
    return token_logprobs(logits, labels, temperature=temperature).to(logits.dtype)


def compute_entropy(logits: Tensor, *, strict: bool = False) -> Tensor:
    """Entropies [...] in nats of softmax(logits) at temperature 1, in the type of logits [..., V].

    A logit of -inf has probability 0 and adds nothing; theirs makes NaN of it, as `strict` does.
    """
    _checks.floating("logits", logits)
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    entropy = token_logprobs(logits, labels, return_entropy=True).entropy.to(logits.dtype)
    if strict:
        entropy = entropy * torch.where(logits.isneginf().any(-1), torch.nan, 1.0).to(entropy.dtype)
    return entropy


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
    *,
    strict: bool = False,
) -> Tensor:
    """Estimates k1, k2 or k3 of KL(policy || base) of each token, clamped to +-10, in fp32 whatever the inputs are.

    With `unbiased_gradient` the value stays and the gradient is that of w k2, where w = exp(log_probs - log_probs_old), at most 10, or 1
    without log_probs_old, is a constant. Theirs adds and subtracts w k2, which loses the value's digits where w k2 is large, all of them
    where it is infinite; ours keeps them, but for `strict`.
    """
    _checks.choice("kl_estimator", kl_estimator, ("k1", "k2", "k3"))
    log_probs, log_probs_base = _narrow("log_probs", log_probs), _narrow("log_probs_base", log_probs_base)
    if not unbiased_gradient:
        return approx_kl(log_probs, log_probs_base, kl_estimator).clamp(-MAX_KL, MAX_KL)
    value = approx_kl(log_probs.detach(), log_probs_base.detach(), kl_estimator).clamp(-MAX_KL, MAX_KL)
    slope = approx_kl(log_probs, log_probs_base, "k2")
    if log_probs_old is not None:
        old = _narrow("log_probs_old", log_probs_old)
        _checks.shape("log_probs_old", old, log_probs.shape, "log_probs' shape")
        slope = (log_probs.detach().float() - old.detach().float()).exp().clamp(max=MAX_IMPORTANCE_WEIGHT) * slope
    if strict:
        return value + slope - slope.detach()
    return with_gradient_of(value, slope)


def _narrow(name: str, x: Tensor) -> Tensor:
    """fp32 in place of fp64; other types are read as they are."""
    _checks.floating(name, x)
    return x.float() if x.dtype == torch.float64 else x


class PolicyLoss(nn.Module):
    """The policy's loss of PPO or GSPO, with or without dual clip, averaged over tokens or over sequences.

    Corrections of the mismatch with the sampler by its ratio exp(old_log_probs - rollout_log_probs) are served: of tokens by masking
    (IcePop) or clipping (TIS), and of whole sequences by masking. Those by `binary_kl` and `tv` are refused. GSPO's ratio is clamped to
    exp(+-20), which theirs is not; with `strict` a larger one is refused.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: list = (0.5, 5.0),
    ) -> None:
        super().__init__()
        if dual_clip is not None:
            _checks.number("dual_clip", dual_clip, above=1)
        _checks.choice("is_correction_level", is_correction_level, ("off", "token", "seq"))
        _checks.choice("is_correction_mode", is_correction_mode, ("mask", "clip"))
        _checks.choice("is_correction_gating", is_correction_gating, ("ratio", "binary_kl", "tv"))
        if is_correction_mode == "clip" and (is_correction_level == "seq" or is_correction_gating != "ratio"):
            raise ValueError(
                "is_correction_mode is 'clip', expected 'mask' unless single tokens are gated by their ratio"
            )
        if is_correction_gating != "ratio" and is_correction_level != "off" and is_correction_threshold[0] > 0:
            raise ValueError(
                f"is_correction_threshold is {is_correction_threshold}, expected a lower bound of 0 for a divergence"
            )
        self.clip_eps_low, self.clip_eps_high, self.dual_clip = clip_eps_low, clip_eps_high, dual_clip
        self.token_level_loss = token_level_loss and policy_loss_type != "gspo"
        self.policy_loss_type = policy_loss_type
        self.is_correction_level, self.is_correction_mode = is_correction_level, is_correction_mode
        self.is_correction_gating, self.is_correction_threshold = is_correction_gating, is_correction_threshold

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
        *,
        strict: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """(loss, share of clipped tokens, mean of old_log_probs - log_probs, mean of rollout_log_probs - old_log_probs, share of tokens or
        sequences outside the bounds); the last two None without a correction.

        Args:
            log_probs, old_log_probs, advantages, rollout_log_probs: [B, T]; action_mask: [B, T], 0 and 1 of any type, or None.
            batch_num_tokens, global_batch_size: what the sum over tokens or sequences is divided by, before it is multiplied by
                `dp_size`; None for their number here.
        """
        constants = {"old_log_probs": old_log_probs, "advantages": advantages}
        corrected = self.is_correction_level != "off"
        if corrected:
            constants["rollout_log_probs"] = rollout_log_probs
        _check_columns({"log_probs": log_probs} | constants, constants)
        mask = None if action_mask is None else binary("action_mask", action_mask, log_probs)
        totals = dp_size, batch_num_tokens, global_batch_size
        aggregation = _aggregation(self.token_level_loss, mask, *totals)
        clip = {"clip_low": self.clip_eps_low, "clip_high": self.clip_eps_high, "dual_clip": self.dual_clip}

        new, old, gate = log_probs, old_log_probs, {}
        vllm_kl = filtered = None
        if self.policy_loss_type == "gspo":
            new = _sequence_log_ratio(
                log_probs, constants["rollout_log_probs" if corrected else "old_log_probs"], mask, strict
            )
            old = torch.zeros_like(new)
        elif self.policy_loss_type != "ppo":
            raise ValueError(f"policy_loss_type is {self.policy_loss_type!r}, expected 'ppo' or 'gspo'")
        elif corrected:
            advantages, gate, filtered = _correction(self, old_log_probs, rollout_log_probs, advantages, mask, strict)
            vllm_kl = _mean_difference(rollout_log_probs, old_log_probs, action_mask, mask, strict)
        loss, stats = ppo_loss(new, old, advantages, mask, **gate, **clip, **aggregation)
        clip_ratio = stats.clipfrac
        if strict:
            term = (new - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() * advantages
            loss = _as_multiplied(loss, mask, term, over_count="denominator" not in aggregation)
            clip_ratio = _as_multiplied(clip_ratio, mask)
        given = [log_probs, *constants.values()]
        loss = loss.to(_loss_dtype(given, action_mask, self.token_level_loss, *totals))
        ppo_kl = _mean_difference(old_log_probs, log_probs, action_mask, mask, strict)
        return loss, clip_ratio.to(_dtype(torch.float32, action_mask)), ppo_kl, vllm_kl, filtered


class ValueLoss(nn.Module):
    """Half of the squared error of values, or with `clip_eps` of the larger one of it and of that of values clipped around the old ones."""

    def __init__(self, clip_eps: float = None, token_level_loss: bool = True) -> None:
        super().__init__()
        self.clip_eps, self.token_level_loss = clip_eps, token_level_loss

    def forward(
        self,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
        *,
        strict: bool = False,
    ) -> Tensor:
        """The 0-d loss. Shapes and divisors as for `PolicyLoss`; old_values are only read with `clip_eps`."""
        constants = {"returns": returns} if self.clip_eps is None else {"returns": returns, "old_values": old_values}
        _check_columns({"values": values} | constants, constants)
        mask = None if action_mask is None else binary("action_mask", action_mask, values)
        totals = dp_size, batch_num_tokens, global_batch_size
        aggregation = _aggregation(self.token_level_loss, mask, *totals)
        nothing = torch.zeros_like(values, requires_grad=False)  # no policy term
        value = {"values": values, "value_clip": self.clip_eps, "vf_coef": 1.0} | constants
        loss = ppo_loss(nothing, nothing, nothing, mask, **value, **aggregation).loss
        if strict:
            terms = [(x - returns).square() for x in (values, constants.get("old_values", values))]
            loss = _as_multiplied(loss, mask, *terms, over_count="denominator" not in aggregation)
        return loss.to(_loss_dtype([values, *constants.values()], action_mask, self.token_level_loss, *totals))


def get_advantages_and_returns(
    self: object,
    values: Tensor,
    rewards: Tensor,
    action_mask: Tensor,
    gamma: float,
    lambd: float,
    *,
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """Generalised advantages and returns [B, T]. A masked step has value and reward 0, but decays what passes it like any other, and its
    own results are not zeroed."""
    values, rewards, dtype = _masked_steps(action_mask, strict, values=values, rewards=rewards)
    advantages, returns = gae(rewards, values, gamma=gamma, lam=lambd)
    return advantages.to(dtype), returns.to(dtype)


def get_cumulative_returns(
    self: object, rewards: Tensor, action_mask: Tensor, gamma: float, *, strict: bool = False
) -> Tensor:
    """Discounted sums of the rewards from each step on [B, T], in the type of `rewards`; masked steps as in `get_advantages_and_returns`."""
    steps, _ = _masked_steps(action_mask, strict, rewards=rewards)
    return gae(steps, torch.zeros_like(steps), gamma=gamma, lam=1.0).advantages.to(rewards.dtype)


def _masked_steps(action_mask: Tensor | None, strict: bool, **columns: Tensor) -> list[Tensor | torch.dtype]:
    """The columns with 0 where they are masked, and the type that they have in common with the mask."""
    _check_columns(columns, {})
    steps = [x.detach() for x in columns.values()]
    if action_mask is not None:
        mask = binary("action_mask", action_mask, steps[0])
        steps = [_masked(x, mask, strict) for x in steps]
    return [*steps, _dtype(*columns.values(), action_mask)]


def _masked(x: Tensor, mask: Tensor, strict: bool) -> Tensor:
    return x * mask if strict else torch.where(mask, x, 0)


def _as_multiplied(mean: Tensor, mask: Tensor | None, *terms: Tensor, over_count: bool = True) -> Tensor:
    """The mean of selected terms as it is where they are multiplied by the mask: NaN if one of them is not finite under it, and, if the
    sum was divided by their count, where nothing is selected."""
    if mask is None:
        return mean
    mean = mean + sum(torch.where(mask, 0, x * 0).sum() for x in terms)
    return mean / mask.any() if over_count else mean


def _dtype(*given: Tensor | torch.dtype | None) -> torch.dtype:
    """The type that all have in common."""
    dtypes = [x if isinstance(x, torch.dtype) else x.dtype for x in given if x is not None]
    return functools.reduce(torch.promote_types, dtypes)


def _loss_dtype(
    columns: list[Tensor], mask: Tensor | None, token_level: bool, dp_size: int, tokens: object, sequences: object
) -> torch.dtype:
    """A sequence's count is a float, and so is a divisor that is a tensor."""
    divisor = tokens if token_level else sequences
    count = None if token_level else torch.float32
    return _dtype(*columns, mask, count, divisor if isinstance(divisor, Tensor) else None)


def _check_columns(columns: dict[str, Tensor], constants: dict[str, Tensor]) -> None:
    """Floating tensors of one shape; the constants among them require no gradient."""
    (first_name, first), *_ = columns.items()
    for name, x in columns.items():
        _checks.floating(name, x)
        _checks.shape(name, x, first.shape, f"{first_name}' shape")
        _checks.same_device(name, x, first_name, first)
        if name in constants and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, expected a constant")


def _aggregation(
    token_level: bool,
    mask: Tensor | None,
    dp_size: int,
    tokens: float | Tensor | None,
    sequences: float | Tensor | None,
) -> dict[str, object]:
    """`ppo_loss`'s options for the mean over tokens or over sequences."""
    divisor = tokens if token_level else sequences
    if mask is None and not (token_level and divisor is None):
        raise ValueError("action_mask is None, expected a mask for all but the mean over tokens")
    by = "token-mean" if token_level else "seq-mean-token-mean"
    if divisor is None:
        return {"aggregation": by}
    dp_size = _checks.number("dp_size", dp_size, above=0)
    return {"aggregation": "fixed-denominator" if token_level else by, "denominator": divisor / dp_size}


def _mean_difference(a: Tensor, b: Tensor, action_mask: Tensor | None, mask: Tensor | None, strict: bool) -> Tensor:
    """The mean of a - b over the unmasked tokens."""
    dtype = _dtype(a, b, action_mask)
    wide = _dtype(dtype, torch.float32)
    difference = a.detach().to(wide) - b.detach().to(wide)
    mean = masked_mean(difference, mask)
    return (_as_multiplied(mean, mask, difference) if strict else mean).to(dtype)


def _sequence_mean(x: Tensor, mask: Tensor | None, strict: bool, at_least: int) -> Tensor:
    """[B, 1]: means of x [B, T] over the unmasked tokens of each sequence, counted as `at_least` so many."""
    if mask is None:
        return x.mean(-1, keepdim=True)
    return _masked(x, mask, strict).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=at_least)


def _sequence_log_ratio(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor | None, strict: bool) -> Tensor:
    """[B, T]: of each token its sequence's mean log-ratio, whose gradient goes to all of the sequence's tokens."""
    wide = _dtype(log_probs, old_log_probs, torch.float32)
    mean = _sequence_mean(log_probs.to(wide) - old_log_probs.to(wide), mask, strict, at_least=1)
    if strict and (mean.detach().abs() > MAX_LOG_RATIO).any():
        raise ValueError(f"a sequence's mean log-ratio is beyond +-{MAX_LOG_RATIO}, where ours is clamped")
    return mean.expand_as(log_probs)


def _correction(
    loss: PolicyLoss,
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    strict: bool,
) -> tuple[Tensor, dict[str, object], Tensor]:
    """(advantages with the weight of each token, `ppo_loss`'s options that drop tokens, share of what is outside the bounds).

    A token's weight is not in its log-ratio but in its advantage, since it stays positive there: so a dropped token has weight 1, and is
    dropped by a ratio of its own, far outside the bounds of `ppo_loss`.
    """
    if loss.is_correction_gating != "ratio":
        raise ValueError(f"is_correction_gating is {loss.is_correction_gating!r}, expected 'ratio'")
    low, high = loss.is_correction_threshold
    wide = _dtype(old_log_probs, rollout_log_probs, torch.float32)
    log_weights = old_log_probs.to(wide) - rollout_log_probs.to(wide)
    weights = log_weights.exp()
    by_sequence = loss.is_correction_level == "seq"
    gated = _sequence_mean(log_weights, mask, strict, at_least=0).exp() if by_sequence else weights
    if loss.is_correction_mode == "clip":
        outside, weights, gate = (gated < low) | (gated > high), gated.clamp(low, high), {}
    else:
        keep = (gated >= low) & (gated <= high)
        outside, weights = ~keep, torch.where(keep, weights, 1)
        rollout_log_probs = torch.where(keep, old_log_probs, -torch.inf)
        gate = {"rollout_logprobs": rollout_log_probs, "rollout_correction": "mask"}
    share = outside.float()
    if by_sequence:
        return advantages * weights, gate, share.mean()
    return advantages * weights, gate, _mean_difference(share, torch.zeros_like(share), mask, mask, strict)


_UTILS, _LOSS = "openrlhf.models.utils", "openrlhf.models.loss"
_MAKER = "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker"
_PEER = Peer(
    "openrlhf",
    "openrlhf",
    {
        "0.11": (
            Replacement(f"{_UTILS}:log_probs_from_logits", log_probs_from_logits),
            Replacement(f"{_UTILS}:compute_entropy", compute_entropy),
            Replacement(f"{_UTILS}:compute_approx_kl", compute_approx_kl),
            Replacement(f"{_LOSS}:PolicyLoss.forward", PolicyLoss.forward),
            Replacement(f"{_LOSS}:ValueLoss.forward", ValueLoss.forward),
            Replacement(f"{_MAKER}.get_advantages_and_returns", get_advantages_and_returns),
            Replacement(f"{_MAKER}.get_cumulative_returns", get_cumulative_returns),
        )
    },
)


def patch(strict: bool = False) -> Patch:
    """Puts ours into the installed OpenRLHF, see `patching.Peer.patch`."""
    return _PEER.patch(strict)


def unpatch() -> None:
    """Puts OpenRLHF's own functions back."""
    _PEER.unpatch()
