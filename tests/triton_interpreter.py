"""What Triton's interpreter lacks: its matrix product multiplies the bits of bfloat16, and its rows are not alike; and where it is slow."""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle


def multiply_as_a_gpu() -> None:
    """Makes `tl.dot` what a GPU gives: of bfloat16, which the interpreter holds as the bits of an uint16, the product of the numbers, and in every
    row the same bits wherever it stands. NumPy's `matmul` sums the rows of a block in different orders on some processors; its `einsum` in one."""

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.einsum("mk,kn->mn", *(_widened(x).astype(d.data.dtype, copy=False) for x in (a, b)))
        return TensorHandle(product + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


def _widened(x: TensorHandle) -> np.ndarray:
    return x.data if x.dtype.scalar != tl.bfloat16 else (x.data.astype(np.uint32) << 16).view(np.float32)


def call_functions_without_delay() -> None:
    """Spares a third of the time: at each call of a function by a kernel the interpreter puts its own operations in place of Triton's, which
    stay where one call of a function of the same module has put them, or the kernel's launch."""
    seen: set[str] = set()
    original = InterpretedFunction.__call__

    def call(self, *args, **kwargs):
        if self.fn.__module__ in seen:
            return self.rewrite()(*args, **kwargs)
        seen.add(self.fn.__module__)
        return original(self, *args, **kwargs)

    InterpretedFunction.__call__ = call
