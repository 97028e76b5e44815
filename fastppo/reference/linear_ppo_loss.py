"""The PPO loss from hidden states, in plain PyTorch: language-model head, log-probabilities, loss."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.reference.ppo_loss import ppo_loss
from fastppo.reference.token_logprobs import token_logprobs


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
    **loss_options,
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """`ppo_loss` of `token_logprobs` of hidden @ weight.T + bias, all in fp32, or in fp64 when hidden or weight is.

    hidden [..., H], weight [V, H], bias [V], labels, mask and loss tensors [...] -> loss (0-d), statistics by name,
    and the detached log-probabilities and entropies [...], 0 where masked or ignored.
    """
    keep = labels != ignore_index if mask is None else mask & (labels != ignore_index)
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        # A kept row is selected before anything is computed: NaN in a masked row reaches neither value nor gradient.
        logits = torch.where(keep.unsqueeze(-1), hidden, 0).to(dtype) @ weight.to(dtype).T
        if bias is not None:
            logits = logits + bias.to(dtype)
        logprobs, entropy = token_logprobs(
            logits,
            torch.where(keep, labels, ignore_index),
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=ignore_index,
            return_entropy=True,
        )
        loss, stats = ppo_loss(logprobs, old_logprobs, advantages, keep, entropy=entropy, **loss_options)
    return loss, stats, logprobs.detach(), entropy.detach()
