"""The public ops: fused kernels with a plain-PyTorch reference behind each."""

from fastppo.ops._backends import use_backend
from fastppo.ops.sample_tokens import SampledTokens, sample_tokens
from fastppo.ops.token_logprobs import TokenLogprobs, token_logprobs

__all__ = ["SampledTokens", "TokenLogprobs", "sample_tokens", "token_logprobs", "use_backend"]
