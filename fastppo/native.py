"""The one place that turns tensors into pointers, sizes and strides for `fastppo._C`.

Callers (`fastppo/ops/`) have checked shapes, types and devices; these functions allocate the outputs and make the call.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

unavailable_reason: str | None = None
try:
    # After torch: the extension then shares the OpenMP runtime, and so the thread pool, that torch has loaded.
    from fastppo import _C
except ImportError as error:
    _C = None
    missing = "No module named" in str(error) or "cannot import name" in str(error)
    unavailable_reason = (
        "the C++ kernels are not built: install a C++17 compiler and install fastppo again"
        if missing
        else f"the C++ kernels do not load: {error}"
    )


def cpu_isa() -> str:
    """Instruction set that the C++ kernels use here: `avx512`, `avx2`, `plain`, or `none` when they are not built.

    `FASTPPO_ISA` lowers it, for tests and comparisons.
    """
    return _C.cpu_isa() if _C is not None else "none"


def threads() -> int:
    return torch.get_num_threads()


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def collapse_rows(x: Tensor) -> Tensor:
    """View of `x` [..., width] as [outer, inner, width] with last stride 1; a copy only where no such view exists."""
    width = x.shape[-1]
    if x.numel() == 0:
        return x.new_empty((0, 1, width))
    if x.stride(-1) != 1 and width > 1:
        x = x.contiguous()
    lead = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size != 1]
    merged: list[tuple[int, int]] = []
    for size, stride in lead:
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return x.contiguous().view(1, -1, width)
    merged = [(1, 0)] * (2 - len(merged)) + merged
    (outer, stride_outer), (inner, stride_inner) = merged
    return x.as_strided((outer, inner, width), (stride_outer, stride_inner, 1))


def rows(x: Tensor) -> tuple[int, int, int, int, int, int, int]:
    """`x` [outer, inner, width] as the bindings' description of strided rows."""
    outer, inner, width = x.shape
    return (x.data_ptr(), DTYPE_CODES[x.dtype], outer, inner, width, x.stride(0), x.stride(1))


def token_logprobs_forward(
    logits: Tensor, labels: Tensor, ignore_index: int, transform: tuple[float, float, float], with_entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """logits [..., V], labels int64 [...] -> logprobs [...], entropy [...] or None, (max, log-sum) [..., 2], all fp32."""
    labels = labels.contiguous()
    logprobs = torch.empty(labels.shape, dtype=torch.float32)
    entropy = torch.empty_like(logprobs) if with_entropy else None
    max_logsum = torch.empty((*labels.shape, 2), dtype=torch.float32)
    view = collapse_rows(logits)
    bad = _C.token_logprobs_forward(
        rows(view), address(labels), ignore_index, transform,
        address(logprobs), address(entropy), address(max_logsum), threads(),
    )  # fmt: skip
    if bad >= 0:
        raise ValueError(
            f"labels holds {labels.view(-1)[bad].item()} at flat position {bad}, "
            f"expected 0 <= label < {logits.shape[-1]} or ignore_index = {ignore_index}"
        )
    return logprobs, entropy, max_logsum


def token_logprobs_backward(
    logits: Tensor, labels: Tensor, ignore_index: int, transform: tuple[float, float, float],
    max_logsum: Tensor, entropy: Tensor | None, d_logprobs: Tensor, d_entropy: Tensor | None, in_place: bool,
) -> Tensor:  # fmt: skip
    """Gradient of the logits, [..., V] in their dtype; with `in_place` it overwrites them."""
    view = collapse_rows(logits)
    labels, d_logprobs = labels.contiguous(), d_logprobs.contiguous()
    d_entropy = None if d_entropy is None else d_entropy.contiguous()
    in_place = in_place and view.data_ptr() == logits.data_ptr()
    grad = logits if in_place else torch.empty(logits.shape, dtype=logits.dtype)
    _C.token_logprobs_backward(
        rows(view), address(labels), ignore_index, transform, address(max_logsum), address(entropy),
        address(d_logprobs), address(d_entropy), address(grad), threads(),
    )  # fmt: skip
    return grad


def sample_tokens(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor,
    sequence_ids: Tensor, positions: Tensor, seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """logits [B, V], the rest [B] -> tokens int64 [B]; log-probs, processed log-probs and kept mass fp32 [B]."""
    tokens = torch.empty(logits.shape[0], dtype=torch.int64)
    floats = [torch.empty(logits.shape[0], dtype=torch.float32) for _ in range(3)]
    parameters = [x.contiguous() for x in (temperature, top_k, top_p, min_p, sequence_ids, positions)]
    view = collapse_rows(logits)
    _C.sample_tokens(rows(view), *map(address, parameters), seed, address(tokens), *map(address, floats), threads())
    return tokens, *floats
