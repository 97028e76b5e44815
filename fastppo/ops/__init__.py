"""The public ops: fused kernels with a plain-PyTorch reference behind each."""

from fastppo.ops._backends import use_backend
from fastppo.ops.decode_attention import decode_attention, write_kv
from fastppo.ops.linear_ppo_loss import LinearPPOLoss, linear_ppo_loss
from fastppo.ops.linear_token_logprobs import linear_token_logprobs
from fastppo.ops.ppo_loss import PPOLoss, PPOStats, ppo_loss
from fastppo.ops.sample_tokens import SampledTokens, sample_tokens
from fastppo.ops.token_logprobs import TokenLogprobs, token_logprobs

__all__ = [
    "LinearPPOLoss",
    "PPOLoss",
    "PPOStats",
    "SampledTokens",
    "TokenLogprobs",
    "decode_attention",
    "linear_ppo_loss",
    "linear_token_logprobs",
    "ppo_loss",
    "sample_tokens",
    "token_logprobs",
    "use_backend",
    "write_kv",
]
