"""Liger-Kernel 0.8 on our ops: the losses that a trainer calls with hidden states or logits, under Liger's names and with its signatures.

All of it runs on the CPU too, where Liger's Triton kernels do not. Logits are never rounded below fp32, nor are sums over chunks, as they are in
half precision in theirs. What stands under a mask is selected away; `LigerFusedLinearGRPOLoss` of theirs multiplies it by 0, and NaN there makes
the loss NaN, as it does here with `strict=True`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastppo.integrations.masks import binary
from fastppo.integrations.patching import Patch, Peer, Replacement
from fastppo.ops import _checks, linear_ppo_loss, linear_token_logprobs, masked_mean, token_logprobs
from fastppo.reference.approx_kl import MAX_K3, MAX_LOG_RATIO, with_gradient_of

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")
LEVELS = ("token", "sequence")
LEFT_OUT = -(2**31)  # label of a masked row, which no tokenizer has


class _Options(NamedTuple):
    """Of GRPO's loss, by `LigerFusedLinearGRPOLoss`'s names."""

    beta: float
    epsilon_low: float
    epsilon_high: float
    loss_type: str
    importance_sampling_level: str
    delta: float | None
    use_bias_correction_kl: bool

    def check(self) -> None:
        _checks.choice("loss_type", self.loss_type, LOSS_TYPES)
        _checks.choice("importance_sampling_level", self.importance_sampling_level, LEVELS)
        if self.loss_type == "cispo" and (self.by_sequence or self.delta is not None):
            raise ValueError("loss_type is 'cispo', expected no delta and importance_sampling_level='token' with it")
        for name in ("beta", "epsilon_low", "epsilon_high"):
            _checks.number(name, getattr(self, name), at_least=0)
        if self.delta is not None:
            _checks.number("delta", self.delta, above=0)

    @property
    def by_sequence(self) -> bool:
        return self.importance_sampling_level == "sequence"


class _Tokens(NamedTuple):
    """What the loss knows of the tokens [B, T], besides their log-probabilities."""

    mask: Tensor
    advantages: Tensor  # [B, 1]
    old: Tensor | None  # None: the log-probabilities themselves
    ref: Tensor | None
    weights: Tensor | None  # [B, T] or [B, 1], of the policy's term
    multiply: bool  # by the mask, as theirs does, in place of selecting

    def unmasked(self, x: Tensor) -> Tensor:
        return x * self.mask if self.multiply else torch.where(self.mask, x, 0)

    def log_ratio(self, logprobs: Tensor, options: _Options) -> Tensor:
        """[B, T], or [B, 1] of whole sequences."""
        log_ratio = logprobs - (logprobs.detach() if self.old is None else self.old)
        if not options.by_sequence:
            return log_ratio
        return self.unmasked(log_ratio).sum(1, keepdim=True) / self.mask.sum(1, keepdim=True).clamp(min=1)

    def outside(self, log_ratio: Tensor, options: _Options) -> Tensor:
        """bool [B, T]: where the ratio is out of the range on the side that its advantage pushes to."""
        ratio = log_ratio.detach().exp()
        if options.loss_type == "cispo":
            found = (ratio > options.epsilon_high) & (self.advantages > 0)
        else:
            too_high = (ratio > 1 + options.epsilon_high) & (self.advantages > 0)
            found = too_high | (ratio < 1 - options.epsilon_low) & (self.advantages < 0)
        return found & self.mask


def _tokens(
    like: Tensor,
    mask: Tensor | None,
    advantages: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    weights: Tensor | None,
    multiply: bool = False,
) -> _Tokens:
    mask = torch.ones(like.shape, dtype=torch.bool, device=like.device) if mask is None else binary("mask", mask, like)
    _checks.floating("advantages", advantages)
    _checks.shape("advantages", advantages, like.shape[:1], "one a sequence")
    for name, x in (("old log-probs", old), ("reference log-probs", ref)):
        if x is not None:
            _checks.floating(name, x)
            _checks.shape(name, x, like.shape, "the tokens' shape")
    old, ref = (None if x is None else x.detach().float() for x in (old, ref))
    if weights is not None:
        _checks.floating("vllm_is_ratio", weights)
        weights = (weights.unsqueeze(1) if weights.dim() == 1 else weights).detach()
        if weights.shape not in (like.shape, (len(like), 1)):
            raise ValueError(f"vllm_is_ratio has shape {list(weights.shape)}, expected one a sequence or a token")
    return _Tokens(mask, advantages.detach().float().unsqueeze(1), old, ref, weights, multiply)


def _token_losses(logprobs: Tensor, tokens: _Tokens, options: _Options) -> tuple[Tensor, Tensor | None, Tensor]:
    """(loss, KL or None, whether clipped) [B, T] of each token, 0 where it is masked."""
    log_ratio, advantages = tokens.log_ratio(logprobs, options), tokens.advantages
    ratio = log_ratio.exp()
    if options.loss_type == "cispo":
        loss = -ratio.clamp(max=options.epsilon_high).detach() * advantages * logprobs
    else:
        clipped = ratio.clamp(1 - options.epsilon_low, 1 + options.epsilon_high) * advantages
        loss = -torch.min((ratio if options.delta is None else ratio.clamp(max=options.delta)) * advantages, clipped)
    loss = loss if tokens.weights is None else loss * tokens.weights
    kl = None
    if options.beta != 0:
        kl = torch.zeros_like(logprobs)
        if tokens.ref is not None:
            kl = _k3(logprobs, tokens.ref) * (ratio if options.use_bias_correction_kl else 1)
            loss = loss + options.beta * kl
        kl = tokens.unmasked(kl).detach()
    return tokens.unmasked(loss), kl, tokens.outside(log_ratio, options)


def _k3(logprobs: Tensor, ref: Tensor) -> Tensor:
    """exp(-d) - 1 + d, d = logprobs - ref, without a clamp."""
    return torch.expm1(ref - logprobs) - (ref - logprobs)


def _sum(losses: Tensor, mask: Tensor, loss_type: str) -> Tensor:
    """Of the tokens' losses or, for "grpo", of the sequences' means."""
    if loss_type != "grpo":
        return losses.sum()
    return (losses.sum(1) / mask.sum(1).clamp(min=1)).sum()


def _divisor(
    mask: Tensor, loss_type: str, max_completion_length: int | None, num_items_in_batch: Tensor | float | None
) -> Tensor | float:
    """What that sum is divided by. With several processes it may be a collective: nothing is refused after it."""
    if loss_type == "grpo":
        return max(len(mask), 1)
    if loss_type == "bnpo":
        return mask.sum().clamp(min=1)
    if loss_type == "dr_grpo":
        return len(mask) * max_completion_length
    several = dist.is_available() and dist.is_initialized()
    if num_items_in_batch is None:
        items = mask.sum().float()
        if several:
            dist.all_reduce(items)
    else:
        items = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=mask.device)
    return (items / (dist.get_world_size() if several else 1)).clamp(min=1)


class LigerFusedLinearGRPOLoss(nn.Module):
    """GRPO's loss from hidden states. Served are the loss types grpo, bnpo, dr_grpo, dapo and cispo.

    Without a KL term, or with one that stays below 10 a token, the gradients are made in the forward pass by `linear_ppo_loss`: 6 N H V flops,
    where theirs takes 8. `compiled` and `chunk_size` change nothing here.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        for name, value in (
            ("sapo_temperature_pos", sapo_temperature_pos),
            ("sapo_temperature_neg", sapo_temperature_neg),
        ):
            _checks.number(name, value, above=0)
        if delta is not None:
            _checks.number("delta", delta, above=0)
        self.beta, self.temperature = beta, temperature
        self.compiled, self.use_ref_model, self.chunk_size = compiled, use_ref_model, chunk_size
        self.epsilon_low, self.epsilon_high, self.delta = epsilon_low, epsilon_high, delta
        self.loss_type, self.importance_sampling_level = loss_type, importance_sampling_level
        self.max_completion_length, self.use_bias_correction_kl = max_completion_length, use_bias_correction_kl
        self.sapo_temperature_pos, self.sapo_temperature_neg = sapo_temperature_pos, sapo_temperature_neg
        self.vespo_k_pos, self.vespo_lambda_pos = vespo_k_pos, vespo_lambda_pos
        self.vespo_k_neg, self.vespo_lambda_neg = vespo_k_neg, vespo_lambda_neg

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        *,
        strict: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss, (mean KL, share of clipped tokens)), without the mean KL where beta is 0; 0-d fp32.

        Args:
            _input: [B, T, H] hidden states of the tokens' positions; lin_weight: [V, H]; bias: [V] or None.
            selected_token_ids: [B, T]; attention_mask: [B, T], 0 and 1 of any type; advantages: [B].
            ref_per_token_logps, old_per_token_logps: [B, T]. Without the latter every ratio is 1; without the former the reference's
                log-probs are made from ref_input, ref_weight and ref_bias.
            vllm_is_ratio: [B, T], [B, 1] or [B], multiplied with the policy's term.
            num_items_in_batch: for dapo and cispo, the number of tokens that the sum is divided by, times the number of processes.
        """
        options = _Options(
            self.beta, self.epsilon_low, self.epsilon_high, self.loss_type, self.importance_sampling_level,
            None if self.loss_type == "cispo" else self.delta, self.use_bias_correction_kl,
        )  # fmt: skip
        options.check()
        _checks.integer("selected_token_ids", selected_token_ids)
        if selected_token_ids.dim() != 2:
            raise ValueError(f"selected_token_ids has shape {list(selected_token_ids.shape)}, expected [B, T]")
        if self.loss_type == "dr_grpo":
            _checks.number("max_completion_length", self.max_completion_length, above=0)
        if self.use_ref_model and ref_per_token_logps is None and ref_input is None:
            raise ValueError("ref_per_token_logps and ref_input are None, expected one of them with use_ref_model")
        reference = ref_per_token_logps if self.use_ref_model and self.beta != 0 else None
        given = reference, vllm_is_ratio
        tokens = _tokens(selected_token_ids, attention_mask, advantages, old_per_token_logps, *given, multiply=strict)
        labels = selected_token_ids.long()
        labels = labels if strict else torch.where(tokens.mask, labels, LEFT_OUT)
        scale = {"temperature": self.temperature, "ignore_index": LEFT_OUT}
        if self.use_ref_model and self.beta != 0 and reference is None:
            with torch.no_grad():
                ref = linear_token_logprobs(ref_input, ref_weight, labels, ref_bias, **scale)
            tokens = tokens._replace(ref=ref.float())
        made = None if strict else _fused(_input, lin_weight, labels, bias, tokens, options, scale)
        if made is None:
            logprobs = linear_token_logprobs(_input, lin_weight, labels, bias, **scale).float()
            losses, kl, clipped = _token_losses(logprobs, tokens, options)
            kl = None if kl is None else masked_mean(kl, tokens.mask)
            made = _sum(losses, tokens.mask, self.loss_type), kl, clipped
        loss, kl, clipped = made
        metrics = [] if kl is None else [kl]
        metrics.append(masked_mean(clipped.float(), tokens.mask))
        divisor = _divisor(tokens.mask, self.loss_type, self.max_completion_length, num_items_in_batch)
        return loss.float() / divisor, tuple(metrics)


def _fused(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, tokens: _Tokens, options: _Options, scale: dict
) -> tuple[Tensor, Tensor | None, Tensor] | None:
    """(summed loss, mean KL or None, whether clipped [B, T]) by `linear_ppo_loss`, or None where that is not the same loss: its clamps hold,
    or it lacks an option."""
    cispo, on_policy = options.loss_type == "cispo", tokens.old is None
    if options.delta is not None and options.delta < 1 + options.epsilon_high:
        return None
    if cispo and options.epsilon_high < 1:
        return None
    if options.by_sequence and tokens.weights is not None and tokens.weights.shape[1] > 1:
        return None
    if tokens.ref is not None and options.use_bias_correction_kl:
        return None
    advantages = tokens.advantages if tokens.weights is None else tokens.advantages * tokens.weights
    advantages = advantages.expand(labels.shape)
    arguments = {"objective": "clip", "clip_low": options.epsilon_low, "clip_high": options.epsilon_high}
    arguments |= {"dual_clip": options.delta, "ratio_level": options.importance_sampling_level}
    if cispo:
        arguments |= {"objective": "cispo", "clip_low": 1.0, "clip_high": options.epsilon_high - 1}
    if on_policy:  # a range of 1 to 1 makes every ratio 1, whatever the old log-probs
        arguments = {"objective": "cispo", "clip_low": 0.0, "clip_high": 0.0}
    if tokens.ref is not None:
        arguments |= {"ref_logprobs": tokens.ref, "kl_coef": options.beta}
    by = "seq-mean-token-mean" if options.loss_type == "grpo" else "fixed-denominator"
    old = torch.zeros(labels.shape, device=labels.device) if on_policy else tokens.old
    result = linear_ppo_loss(
        hidden,
        weight,
        labels,
        old,
        advantages,
        tokens.mask,
        bias=bias,
        aggregation=by,
        denominator=1.0,
        **scale,
        **arguments,
    )
    logprobs = result.logprobs.float()
    log_ratio = tokens.log_ratio(logprobs, options)
    clamped = log_ratio.abs() > MAX_LOG_RATIO
    if tokens.ref is not None:
        clamped = clamped | (_k3(logprobs, tokens.ref) > MAX_K3)
    if (clamped & tokens.mask).any():
        return None
    loss = result.loss
    if on_policy and not cispo:  # that objective has the gradient of -advantage * 1, and another value
        policy = torch.where(tokens.mask, -advantages, 0)
        loss = with_gradient_of(
            _sum(policy, tokens.mask, options.loss_type) + options.beta * result.stats.kl_loss, loss
        )
    kl = result.stats.kl_ref if options.beta != 0 else None
    return loss, kl, tokens.outside(log_ratio, options).expand(labels.shape)


def triton_grpo_loss(
    logits: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor | None = None,
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: Tensor | float | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> tuple[Tensor, Tensor | None, Tensor] | tuple[Tensor, list[Tensor]]:
    """GRPO's loss from logits [B, T + 1, V], whose last position is not looked at: fp32 (losses, KL or None, whether clipped) [B, T], 0 where
    masked, or with `reduce` (loss, [mean KL if beta is not 0, share of clipped tokens]).

    `inplace` lets the backward pass write the gradient over the logits. Ours does not do so to a leaf or a view of one, theirs does.
    """
    options = _Options(beta, eps_low, eps_high, loss_type, importance_sampling_level, delta, use_bias_correction_kl)
    options.check()
    _checks.floating("logits", logits)
    _checks.integer("completion_ids", completion_ids)
    if completion_ids.dim() != 2 or logits.dim() != 3 or logits.shape[1] != completion_ids.shape[1] + 1:
        raise ValueError(f"logits has shape {list(logits.shape)}, expected [B, T + 1, V] for completion_ids [B, T]")
    if beta != 0 and ref_logp is None:
        raise ValueError(f"ref_logp is None, expected a tensor because beta is {beta}")
    given = advantages, old_logp, ref_logp if beta != 0 else None, vllm_is_ratio
    tokens = _tokens(completion_ids, completion_mask, *given)
    logprobs = _shifted_logprobs(logits, completion_ids, tokens.mask, temperature, inplace)
    losses, kl, clipped = _token_losses(logprobs, tokens, options)
    if not reduce:
        return losses, kl, clipped.expand(losses.shape).float()
    metrics = [] if kl is None else [masked_mean(kl, tokens.mask)]
    metrics.append(masked_mean(clipped.expand(losses.shape).float(), tokens.mask))
    length = completion_ids.shape[1] if max_completion_length is None else max_completion_length
    loss = _sum(losses, tokens.mask, loss_type)
    return loss / _divisor(tokens.mask, loss_type, length, num_items_in_batch), metrics


@torch.no_grad()
def fused_selective_log_softmax(
    logits: Tensor, input_ids: Tensor, temperature: float = 0.9, mask: Tensor | None = None
) -> Tensor:
    """fp32 [B, T]: log-probabilities, without a gradient, of the last T of `input_ids` under logits [B, T + 1, V]; 0 where masked."""
    _checks.floating("logits", logits)
    _checks.integer("input_ids", input_ids)
    if logits.dim() != 3 or input_ids.dim() != 2 or input_ids.shape[1] < logits.shape[1] - 1:
        raise ValueError(
            f"logits has shape {list(logits.shape)}, expected [B, T + 1, V] for input_ids with T or more columns"
        )
    first = input_ids.shape[1] - logits.shape[1] + 1
    ids = input_ids[:, first:]
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else binary("mask", mask, input_ids)[:, first:]
    return _shifted_logprobs(logits, ids, kept, temperature, inplace=False)


def _shifted_logprobs(logits: Tensor, ids: Tensor, mask: Tensor, temperature: float, inplace: bool) -> Tensor:
    """fp32 [B, T] of logits [B, T + 1, V], which are read as they lie: the last position and masked ones have no label."""
    labels = torch.full(logits.shape[:2], LEFT_OUT, dtype=torch.int64, device=logits.device)
    labels[:, :-1] = torch.where(mask, ids, LEFT_OUT)
    inplace = inplace and not (logits if logits._base is None else logits._base).is_leaf
    options = {"temperature": temperature, "ignore_index": LEFT_OUT, "inplace_backward": inplace}
    return token_logprobs(logits, labels, **options)[:, :-1].float()


class LigerFusedLinearScaledCrossEntropyFunction:
    """Negative log-probabilities [M] of `target`, fp32, and with `return_entropy` entropies in the type of `_input` [M, H]."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: float = 1.0,
        ignore_index: int = -100,
        m_tiles_per_cluster: int = 1,
        return_entropy: bool = False,
        selected_token_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Ignored rows are 0. `m_tiles_per_cluster` changes nothing here; `selected_token_ids` is refused."""
        if selected_token_ids is not None:
            raise ValueError("selected_token_ids is given, expected None")
        _check_rows(_input)
        if not isinstance(return_entropy, bool):
            raise TypeError(f"return_entropy is {return_entropy!r}, expected a bool")
        _checks.integer_number("m_tiles_per_cluster", m_tiles_per_cluster, at_least=1)
        options = {"temperature": temperature, "ignore_index": ignore_index, "return_entropy": return_entropy}
        found = linear_token_logprobs(_input, weight, target, **options)
        if not return_entropy:
            return -found.float()
        return -found.logprobs.float(), found.entropy.to(_input.dtype)


class LigerFusedLinearCrossEntropyFunction:
    """Cross-entropy of `target` [N] under the logits _input [N, H] @ weight.T + bias."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
        ce_impl: str | None = None,
        ce_mode: str | None = None,
        chunk_mem_const: int = 1,
    ) -> tuple[Tensor, None, None, None]:
        """(loss, None, None, None): fp32 mean or sum over the rows that are not ignored, or each row's, 0 for ignored ones.

        Every option with a default but `bias`, `ignore_index`, `reduction`, `softcap`, `accum_dtype` (or fp32) and `chunk_mem_const` is
        refused where it is set. Sums are fp32 whatever `accum_dtype` is. A frozen `_input` leaves the weight its gradient; theirs gives none.
        """
        unset = {"ce_weight": ce_weight, "ce_impl": ce_impl, "ce_mode": ce_mode, "label_smoothing": label_smoothing}
        unset |= {
            "lse_square_scale": lse_square_scale,
            "use_token_scaling": use_token_scaling,
            "return_z_loss": return_z_loss,
        }
        unset |= {"return_token_accuracy": return_token_accuracy, "return_predicted_tokens": return_predicted_tokens}
        for name, value in unset.items():
            if isinstance(value, Tensor) or value:
                raise ValueError(f"{name} is set, expected its default")
        if accum_dtype not in (None, torch.float32):
            raise ValueError(f"accum_dtype is {accum_dtype}, expected None or torch.float32")
        _checks.choice("reduction", reduction, ("mean", "sum", "none"))
        _checks.integer_number("chunk_mem_const", chunk_mem_const, at_least=1)
        _check_rows(_input)
        options = {"softcap": softcap, "ignore_index": ignore_index}
        losses = -linear_token_logprobs(_input, weight, target, bias, **options).float()
        if reduction == "none":
            return losses, None, None, None
        total = losses.sum()
        if reduction == "mean":
            total = total / (target != ignore_index).sum().clamp(min=1)
        return total, None, None, None


def _check_rows(hidden: Tensor) -> None:
    _checks.floating("_input", hidden)
    if hidden.dim() != 2:
        raise ValueError(f"_input has shape {list(hidden.shape)}, expected [N, H]")


_OPS = "liger_kernel.ops"
_CROSS_ENTROPY = f"{_OPS}:LigerFusedLinearCrossEntropyFunction"
_PEER = Peer(
    "liger_kernel",
    "liger-kernel",
    {
        "0.8": (
            Replacement(
                "liger_kernel.chunked_loss.grpo_loss:LigerFusedLinearGRPOLoss.forward", LigerFusedLinearGRPOLoss.forward
            ),
            Replacement("liger_kernel.transformers.grpo_loss:triton_grpo_loss", triton_grpo_loss),
            Replacement("liger_kernel.ops.grpo_loss:fused_selective_log_softmax", fused_selective_log_softmax),
            Replacement(
                f"{_OPS}:LigerFusedLinearScaledCrossEntropyFunction.apply",
                LigerFusedLinearScaledCrossEntropyFunction.apply,
            ),
            Replacement(
                f"{_CROSS_ENTROPY}.apply",
                LigerFusedLinearCrossEntropyFunction.apply,
                signature=f"{_CROSS_ENTROPY}.forward",
            ),
        )
    },
)


def patch(strict: bool = False) -> Patch:
    """Puts ours into the installed Liger-Kernel, see `patching.Peer.patch`."""
    return _PEER.patch(strict)


def unpatch() -> None:
    """Puts Liger-Kernel's own functions back."""
    _PEER.unpatch()
