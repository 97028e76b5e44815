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


def log_softmax(z: Tensor) -> Tensor:
    """log softmax(z) over the last dimension, to the last digits also where one element has nearly all the probability.

    There log p = -log(1 + s) with a small s, of which torch.log_softmax keeps only what 1 + s does. So the sum leaves out one
    of the largest: log sum exp z = max z + log1p(sum over the others of exp(z - max z)).
    """
    top, place = z.max(dim=-1, keepdim=True)
    own = (top - top).detach()  # 0, or NaN where there is no distribution
    shifted = (z - top).scatter(-1, place, own)
    rest = shifted.exp().scatter(-1, place, own).sum(-1, keepdim=True)
    return shifted - rest.log1p()


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
    log_p = log_softmax(z)
    logprobs = torch.where(keep, log_p.gather(-1, safe_labels.unsqueeze(-1)).squeeze(-1), 0)
    if not return_entropy:
        return logprobs
    # p = 0 adds nothing though log p is -inf; NaN (no distribution) stays.
    finite_log_p = torch.where(log_p == -torch.inf, 0, log_p)
    entropy = -(log_p.exp() * finite_log_p).sum(-1)
    return logprobs, torch.where(keep, entropy, 0)
