"""A tool that computes: arithmetic on numbers, and nothing else of Python."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

MAX_CHARACTERS = 1000
MAX_BITS = 4096  # of a whole number on the way
OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def calculator(expression: str) -> str:
    """
    Computes an arithmetic expression.

    Args:
        expression: Numbers with +, -, *, /, //, %, ** and parentheses, for example "(17 + 4) * 2".

    Returns:
        The result.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"the expression has {len(expression)} characters, expected at most {MAX_CHARACTERS}")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        value = _real(_value(tree.body))
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{expression!r} is no arithmetic expression") from None
    except OverflowError:
        raise ValueError("the result is too large") from None
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = _value(node.left), _value(node.right)
        _require_small(node.op, left, right)
        return _real(OPERATORS[type(node.op)](left, right))
    raise ValueError(
        f"{ast.unparse(node)!r} is no arithmetic: expected numbers with +, -, *, /, //, %, ** and parentheses"
    )


def _require_small(op: ast.operator, left: int | float, right: int | float) -> None:
    """Before whole numbers that would fill the memory are made."""
    if not isinstance(left, int) or not isinstance(right, int):
        return
    bits = left.bit_length() * max(right, 1) if isinstance(op, ast.Pow) else left.bit_length() + right.bit_length()
    if bits > MAX_BITS:
        raise OverflowError


def _real(value: Any) -> int | float:
    if isinstance(value, complex) or not math.isfinite(value):
        raise ValueError("the result is no finite real number")
    return value
