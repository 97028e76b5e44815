"""Token log-probabilities and entropy from logits, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def transform_logits(logits: Tensor, temperature: float, softcap: float | None, logit_scale: float) -> Tensor:
    """z = softcap * tanh(logits * logit_scale / softcap) / temperature, in fp32 or wider."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(z)[label] and H = -sum p log p, where z are the transformed logits.

    logits [..., V] floating, labels [...] integer -> fp32 [...] (fp64 for fp64 logits), with entropy of the same shape.
    Rows whose label is `ignore_index` give 0 and no gradient, whatever they hold.
    """
    keep = labels != ignore_index
    safe_labels = torch.where(keep, labels, 0).long()
    # A kept row is selected before anything is computed: NaN under an ignored label reaches neither value nor gradient.
    z = transform_logits(torch.where(keep.unsqueeze(-1), logits, 0), temperature, softcap, logit_scale)
    log_p = torch.log_softmax(z, dim=-1)
    logprobs = torch.where(keep, log_p.gather(-1, safe_labels.unsqueeze(-1)).squeeze(-1), 0)
    if not return_entropy:
        return logprobs
    # p = 0 adds nothing though log p is -inf; NaN (no distribution) stays.
    finite_log_p = torch.where(log_p == -torch.inf, 0, log_p)
    entropy = -(log_p.exp() * finite_log_p).sum(-1)
    return logprobs, torch.where(keep, entropy, 0)
