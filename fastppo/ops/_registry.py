"""Registration of ops and of their gradients with `torch.library`, with less to do at each call than its `custom_op`.

`custom_op` looks on every call for outputs that alias inputs and goes through an autograd layer even of an op that has
no gradient: 10 of 23 µs for a small op, which is what a decode step or a loss of a few tokens costs in all.

What an op cannot differentiate it refuses by name: an input that requires a gradient of an op without one, and second
derivatives, forward mode and `torch.func` of an op with one. Each would otherwise silently count it as a constant.
"""

from __future__ import annotations

import re
from collections import namedtuple
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad

from fastppo.ops._numbers import as_tensor, is_dynamic

_LIBRARY = torch.library.Library("fastppo", "FRAGMENT")


class Op:
    """The op `fastppo::name`, and where it takes floats `fastppo::name_dynamic`, which takes fp64 tensors on the CPU for them.

    The second is for compiled graphs whose floats are dynamic. It reads them on the host at each call, which a CUDA graph would do but once:
    it is marked as unfit for one.
    """

    def __init__(self, name: str, function: Callable, mutates_args: Sequence[str]) -> None:
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        self.overload = _define(name, schema, function, mutates_args)
        self.overloads = [self.overload]
        arguments = self.overload._schema.arguments
        self.numbers = [n for n, argument in enumerate(arguments) if str(argument.type) in ("float", "List[float]")]
        if self.numbers:
            self.dynamic = self._define_dynamic(name, schema, function, mutates_args)
            self.overloads.append(self.dynamic)

    def __call__(self, *args: object) -> Tensor | tuple[Tensor, ...] | None:
        if self.numbers:
            # What is a tensor already comes from a forward pass, by way of its context.
            if isinstance(args[self.numbers[0]], Tensor):
                return self.dynamic(*args)
            if torch.compiler.is_compiling() and any(is_dynamic(args[place]) for place in self.numbers):
                return self.dynamic(*self._with_numbers(as_tensor, args))
        return self.overload(*args)

    def _with_numbers(self, change: Callable, args: Sequence[object]) -> list[object]:
        return [change(x) if place in self.numbers else x for place, x in enumerate(args)]

    def _define_dynamic(self, name: str, schema: str, function: Callable, mutates_args: Sequence[str]) -> OpOverload:
        def of_tensors(*args: object) -> Tensor | tuple[Tensor, ...] | None:
            return function(*self._with_numbers(Tensor.tolist, args))

        @torch.no_grad()
        def fake(*args: object) -> Tensor | tuple[Tensor, ...] | None:
            return self.overload(*self._with_numbers(lambda x: [0.0] * len(x) if x.dim() else 0.0, args))

        schema = re.sub(r"float(\[\])? ", "Tensor ", schema)
        overload = _define(f"{name}_dynamic", schema, of_tensors, mutates_args, tags=(torch.Tag.cudagraph_unsafe,))
        if overload._schema.returns:
            torch.library.register_fake(overload.name(), fake)
        return overload


def custom_op(name: str, *, mutates_args: Sequence[str] = ()) -> Callable[[Callable], Op]:
    """Decorator that makes a function of tensors and numbers the op `fastppo::name`, on every device.

    The schema is read from the function's annotations. The function returns new tensors, none of which shares memory
    with an input, and changes no argument but those that `mutates_args` names. Fake and gradient follow by
    `torch.library.register_fake` and `register_gradient`; without the latter, inputs that require a gradient are an error.
    """
    return lambda function: Op(name, function, mutates_args)


def _define(
    name: str, schema: str, function: Callable, mutates_args: Sequence[str], tags: Sequence[torch.Tag] = ()
) -> OpOverload:
    _LIBRARY.define(name + schema, tags=tags)
    overload = getattr(torch.ops.fastppo, name).default
    mutated = [place for place, argument in enumerate(overload._schema.arguments) if argument.name in mutates_args]
    # Compiled graphs call the kernel: the compiler shall not look into it.
    kernel = torch.compiler.disable(_kernel(overload, function, mutated))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    if not overload._schema.returns:
        torch.library.register_fake(f"fastppo::{name}", lambda *args: None)
    return overload


def _kernel(op: OpOverload, function: Callable, mutated: list[int]) -> Callable:
    def run(*args: object) -> Tensor | tuple[Tensor, ...] | None:
        # Never true below `register_gradient`: there the graph is recorded, and grad mode is off.
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            raise RuntimeError(
                f"{op.name()} has no derivative, but one of its inputs requires a gradient: "
                f"expected detached inputs, or a call under torch.no_grad()"
            )
        outputs = function(*args)
        if mutated:  # autograd has to know
            torch.autograd.graph.increment_version([args[place] for place in mutated])
        return outputs

    return run


def register_gradient(
    op: Op,
    names: Sequence[str],
    setup_context: Callable,
    backward: Callable,
    *,
    differentiable_backward: bool = False,
) -> None:
    """Makes `backward` the gradient of `op` with respect to the arguments of these names.

    setup_context(ctx, inputs, outputs) has the arguments by their names, `inputs.logits`, and finds in `ctx.wanted` which
    of `names` require a gradient. backward(ctx, *upstream) returns one gradient, or None, for each of `names`, in their
    order. differentiable_backward: it consists of torch's own ops, and can be differentiated again.
    """
    for overload in op.overloads:
        _register_gradient(overload, names, setup_context, backward, differentiable_backward)


def _register_gradient(
    op: OpOverload, names: Sequence[str], setup_context: Callable, backward: Callable, differentiable_backward: bool
) -> None:
    arguments = [argument.name for argument in op._schema.arguments]
    tensors = [argument.name for argument in op._schema.arguments if "Tensor" in str(argument.type)]
    for name in names:
        if name not in tensors:
            raise ValueError(f"gradient of {name!r}, expected one of {op.name()}'s tensors: {', '.join(tensors)}")
    places = [arguments.index(name) for name in names]
    by_name = namedtuple("Inputs", arguments)

    def forward(ctx, *args):
        *inputs, keyset = args
        ctx.wanted = [ctx.needs_input_grad[place] for place in places]
        outputs = _below_autograd(op, keyset, inputs)
        setup_context(ctx, by_name._make(inputs), outputs)
        return outputs

    def placed_gradients(ctx, *upstream):
        if torch.is_grad_enabled() and not differentiable_backward:
            raise _refusal(op, "no second derivative (create_graph=True)")
        gradients = [None] * (len(arguments) + 1)  # the last one is the keyset's
        for place, gradient in zip(places, backward(ctx, *upstream), strict=True):
            gradients[place] = gradient
        return tuple(gradients)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(placed_gradients)}
    node = type(op.name().replace("::", "_"), (torch.autograd.Function,), methods)

    def record(keyset, *args):
        if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
            raise _refusal(op, "no forward-mode derivative (jvp, jacfwd, dual tensors)")
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return _below_autograd(op, keyset, args)
        if torch._C._are_functorch_transforms_active():
            raise _refusal(op, "no derivative under torch.func (grad, vjp, hessian and the like)")
        return node.apply(*args, keyset)

    _LIBRARY.impl(op._opname, record, "Autograd", with_keyset=True)


def _below_autograd(op: OpOverload, keyset: torch._C.DispatchKeySet, args: Sequence[object]) -> object:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _has_tangent(x: object) -> bool:
    return isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None


def _refusal(op: OpOverload, what: str) -> RuntimeError:
    return RuntimeError(
        f"{op.name()} has {what}: expected .backward() or torch.autograd.grad without create_graph, "
        f"or float64 inputs, which go to the plain PyTorch reference and have every derivative"
    )
