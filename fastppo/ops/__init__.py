"""The public ops: fused kernels with a plain-PyTorch reference behind each."""

from fastppo.ops._backends import use_backend
from fastppo.ops.approx_kl import approx_kl, kl_shaped_rewards
from fastppo.ops.gae import GAE, gae
from fastppo.ops.masked_whiten import masked_mean, masked_whiten
from fastppo.ops.token_logprobs import TokenLogprobs, token_logprobs

__all__ = [
    "GAE",
    "TokenLogprobs",
    "approx_kl",
    "gae",
    "kl_shaped_rewards",
    "masked_mean",
    "masked_whiten",
    "token_logprobs",
    "use_backend",
]
