"""The one place that turns tensors into pointers, sizes and strides for `fastppo._C`.

Here is what all kernels share; `fastppo/native/<stem>.py` allocates an op's outputs and makes its calls. The callers
(`fastppo/ops/`) have checked shapes, types and devices.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def check_same(name: str, ours: object) -> None:
    """ImportError where csrc/ has other numbers for what is kept as `name` here: the extension is of another version."""
    if _C is not None and getattr(_C, name, None) != ours:
        raise ImportError(
            f"{name} is {getattr(_C, name, None)} in {_C.__file__}, expected {ours}: install fastppo again to build it anew"
        )


def codes(names: Sequence[object]) -> dict[str, int]:
    """The numbers of an enum of csrc/ops.h whose names, in order, are these."""
    return {str(name): code for code, name in enumerate(names)}


check_same("DTYPE_CODES", {str(dtype).removeprefix("torch."): code for dtype, code in DTYPE_CODES.items()})

# Device types whose tensors the CUDA kernels serve; the tests add "cpu" where they execute those kernels on one.
cuda_device_types = {"cuda"}


def cuda_unavailable_reason() -> str | None:
    """Why the CUDA kernels cannot be called at all; None when they can."""
    if _C is None:
        return unavailable_reason
    if not hasattr(_C, "cuda"):
        return "the CUDA kernels are not built: install nvcc (CUDA 12 or newer) and install fastppo again"
    return None


def on_cuda(tensor: Tensor) -> bool:
    """Whether the CUDA kernels serve `tensor`, rather than those of the CPU."""
    return tensor.device.type in cuda_device_types


def stream(tensor: Tensor) -> tuple[int, int]:
    """(device, stream handle) on which a kernel for `tensor` is to run: its own device, that device's current stream."""
    if not tensor.is_cuda:
        return (0, 0)
    return (tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream)


def cpu_isa() -> str:
    """Instruction set that the C++ kernels use here: `avx512`, `avx2`, `plain`, or `none` when they are not built.

    `FASTPPO_ISA` lowers it, for tests and comparisons.
    """
    return _C.cpu_isa() if _C is not None else "none"


def threads() -> int:
    return torch.get_num_threads()


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# glibc maps anew whatever is larger, each time that it is asked for (DEFAULT_MMAP_THRESHOLD_MAX of its malloc).
MAPPED_BYTES = 32 << 20


def on_huge_pages(x: Tensor) -> Tensor:
    """`x`, new and not yet written to. Where it is memory of the system and large, its pages will be huge ones, if the system gives them to those
    who ask: to fill 64 MiB for the first time takes a quarter of the time then (15 and 3.7 ms on two cores of an AMD EPYC)."""
    if _C is not None and x.device.type == "cpu" and x.nbytes > MAPPED_BYTES:
        _C.prefer_huge_pages(x.data_ptr(), x.nbytes)
    return x


def column(x: Tensor) -> tuple[int, int]:
    """Contiguous numbers as the bindings' description of them."""
    return (x.data_ptr(), DTYPE_CODES[x.dtype])


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


def steps(x: Tensor | None) -> tuple[int, int, int, int]:
    """`x` [B, T], or [total] of packed tokens, as the bindings' description of strided steps; zeros for None."""
    if x is None:
        return (0, 0, 0, 0)
    stride_sequence, stride_step = (0, x.stride(0)) if x.dim() == 1 else x.stride()
    return (x.data_ptr(), DTYPE_CODES.get(x.dtype, 0), stride_sequence, stride_step)


def as_offsets(cu_seqlens: Tensor | None, tokens: int) -> Tensor | None:
    """int64 offsets [B + 1] of sequences in `tokens` packed tokens, checked: ValueError on the CPU.

    On a GPU, which the host must not wait for, wrong offsets become the kernels' mark for results that are NaN.
    """
    if cu_seqlens is None:
        return None
    cu_seqlens, count = cu_seqlens.contiguous(), cu_seqlens.shape[0] - 1
    if on_cuda(cu_seqlens):
        offsets = torch.empty_like(cu_seqlens, dtype=torch.int64)
        is_int64 = cu_seqlens.dtype == torch.int64
        _C.cuda.check_offsets(address(cu_seqlens), is_int64, count, tokens, address(offsets), stream(offsets))
        return offsets
    offsets = cu_seqlens.long()
    bad = _C.first_bad_offset(address(offsets), count, tokens)
    if bad >= 0:
        raise ValueError(
            f"cu_seqlens holds {offsets[bad].item()} at position {bad}, "
            f"expected 0 first, no decrease and {tokens} (all tokens) last"
        )
    return offsets


def sequences(x: Tensor, offsets: Tensor | None) -> tuple[int, int, int]:
    """How the tokens of `x` divide into sequences: rows of [B, T], or [total] cut at `offsets`, as `as_offsets` makes them.

    (address of the offsets or 0, number of sequences, T or total)
    """
    return (0, *x.shape) if offsets is None else (address(offsets), offsets.shape[0] - 1, x.shape[0])


def flat_float(x: Tensor) -> Tensor:
    """`x` as contiguous fp32; itself where it is that already."""
    return x.float().contiguous()
