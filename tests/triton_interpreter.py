"""What Triton's interpreter lacks: it holds bfloat16 as the bits of an uint16, and its matrix product multiplies those bits; and where it is slow."""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle


def multiply_bfloat16() -> None:
    """Makes `tl.dot` of bfloat16 the product of the numbers: widened to fp32, which is exact, as tensor cores do."""
    original = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        return original(self, _widened(a), _widened(b), *rest)

    InterpreterBuilder.create_dot = create_dot


def _widened(x: TensorHandle) -> TensorHandle:
    if x.dtype.scalar != tl.bfloat16:
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


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
