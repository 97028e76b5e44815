"""Allocates the outputs of `sample_tokens` and calls the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.native import _C, address, collapse_rows, on_cuda, rows, stream, threads


def sample_tokens(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
    sequence_ids: Tensor, positions: Tensor, seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """logits [B, V], the rest [B] -> tokens int64 [B]; log-probs, processed log-probs and kept mass fp32 [B]."""
    count, width = logits.shape
    tokens = logits.new_empty(count, dtype=torch.int64)
    floats = [logits.new_empty(count, dtype=torch.float32) for _ in range(3)]
    parameters = [x.contiguous() for x in (temperature, top_k, top_p, min_p, sequence_ids, positions)]
    view = collapse_rows(logits)
    arguments = (rows(view), *map(address, parameters), seed, address(tokens), *map(address, floats))
    if on_cuda(logits):
        scratch = logits.new_empty(_C.cuda.sample_tokens_scratch(count, width), dtype=torch.uint8)
        _C.cuda.sample_tokens(*arguments, address(scratch), stream(logits))
    else:
        _C.sample_tokens(*arguments, threads())
    return tokens, *floats
