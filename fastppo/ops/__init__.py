"""The public ops: fused kernels with a plain-PyTorch reference behind each."""

from fastppo.ops._backends import use_backend
from fastppo.ops.approx_kl import approx_kl, kl_shaped_rewards
from fastppo.ops.batch_invariant_linear import batch_invariant_linear
from fastppo.ops.decode_attention import decode_attention, write_kv
from fastppo.ops.gae import GAE, gae
from fastppo.ops.linear_ppo_loss import LinearPPOLoss, linear_ppo_loss
from fastppo.ops.linear_token_logprobs import linear_token_logprobs
from fastppo.ops.masked_whiten import masked_mean, masked_whiten
from fastppo.ops.packed_attention import packed_attention
from fastppo.ops.ppo_loss import PPOLoss, PPOStats, ppo_loss
from fastppo.ops.rms_norm import RmsNorm, rms_norm
from fastppo.ops.rotary_embedding import rotary_embedding
from fastppo.ops.sample_tokens import SampledTokens, sample_tokens
from fastppo.ops.swiglu import swiglu
from fastppo.ops.token_logprobs import TokenLogprobs, token_logprobs

__all__ = [
    "GAE",
    "LinearPPOLoss",
    "PPOLoss",
    "PPOStats",
    "RmsNorm",
    "SampledTokens",
    "TokenLogprobs",
    "approx_kl",
    "batch_invariant_linear",
    "decode_attention",
    "gae",
    "kl_shaped_rewards",
    "linear_ppo_loss",
    "linear_token_logprobs",
    "masked_mean",
    "masked_whiten",
    "packed_attention",
    "ppo_loss",
    "rms_norm",
    "rotary_embedding",
    "sample_tokens",
    "swiglu",
    "token_logprobs",
    "use_backend",
    "write_kv",
]
