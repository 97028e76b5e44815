"""The public ops: fused kernels with a plain-PyTorch reference behind each."""

from fastppo.ops._backends import use_backend
from fastppo.ops.ppo_loss import PPOLoss, PPOStats, ppo_loss
from fastppo.ops.token_logprobs import TokenLogprobs, token_logprobs

__all__ = ["PPOLoss", "PPOStats", "TokenLogprobs", "ppo_loss", "token_logprobs", "use_backend"]
