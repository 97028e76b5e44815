"""Registration of ops with `torch.library`, with less to do at each call than `torch.library.custom_op`.

`custom_op` looks on every call for outputs that alias inputs and goes through an autograd layer even of an op that has
no gradient: 10 of 23 µs for a small op, which is what a decode step or a loss of a few tokens costs in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch._ops import OpOverload

_LIBRARY = torch.library.Library("fastppo", "FRAGMENT")


def custom_op(name: str, *, mutates_args: Iterable[str] = ()) -> Callable[[Callable], OpOverload]:
    """Decorator that makes a function of tensors and numbers the op `fastppo::name`, on every device.

    The schema is read from the function's annotations. The function returns new tensors, none of which shares memory
    with an input, and changes no argument but those that `mutates_args` names. Fake and autograd follow by
    `torch.library.register_fake` and `torch.library.register_autograd`.
    """

    def register(function: Callable) -> OpOverload:
        schema = torch.library.infer_schema(function, mutates_args=tuple(mutates_args))
        _LIBRARY.define(name + schema)
        overload = getattr(torch.ops.fastppo, name).default
        mutated = [place for place, argument in enumerate(overload._schema.arguments) if argument.name in mutates_args]
        kernel = _bumping_versions(function, mutated) if mutated else function
        # Compiled graphs call the kernel: the compiler shall not look into it.
        _LIBRARY.impl(name, torch.compiler.disable(kernel), "CompositeExplicitAutograd")
        if not overload._schema.returns:
            torch.library.register_fake(f"fastppo::{name}", lambda *args: None)
        return overload

    return register


def refuse_gradient(name: str) -> None:
    """Makes a gradient through `fastppo::name` an error: without it, a second derivative would silently be 0."""

    def refuse(ctx: object, *grads: Tensor) -> None:
        raise RuntimeError(
            f"fastppo::{name} has no derivative: a second derivative was asked for, expected a first one"
        )

    torch.library.register_autograd(f"fastppo::{name}", refuse)


def _bumping_versions(function: Callable, mutated: list[int]) -> Callable:
    """`function`, after which autograd knows that the arguments at these places were changed in place."""

    def run(*args: object) -> Tensor | tuple[Tensor, ...] | None:
        outputs = function(*args)
        torch.autograd.graph.increment_version([args[place] for place in mutated])
        return outputs

    return run
