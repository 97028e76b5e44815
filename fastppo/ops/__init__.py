"""The public ops: fused kernels with a plain-PyTorch reference behind each."""

from fastppo.ops._backends import use_backend
from fastppo.ops.linear_ppo_loss import LinearPPOLoss, linear_ppo_loss
from fastppo.ops.ppo_loss import PPOLoss, PPOStats, ppo_loss
from fastppo.ops.token_logprobs import TokenLogprobs, token_logprobs

__all__ = [
    "LinearPPOLoss",
    "PPOLoss",
    "PPOStats",
    "TokenLogprobs",
    "linear_ppo_loss",
    "ppo_loss",
    "token_logprobs",
    "use_backend",
]
