"""Logits that are made only if something reads them: a cross-entropy of them runs in the fused head instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

from fastppo.ops import linear_token_logprobs
from fastppo.ops._backends import FAST_DTYPES

DEVICES = ("cpu", "cuda")  # where the fused head has kernels
Step = Callable[[Tensor], Tensor]


class HeadCall(NamedTuple):
    """hidden [..., H] @ weight [V, H].T + bias [V], as the head would have been called."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    autocast: torch.dtype | None
    grad: bool
    versions: tuple[int, ...]

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def logits(self, steps: tuple[Step, ...]) -> Tensor:
        """The product, and what was done with it."""
        if self.versions != _versions(self.tensors) or self.weight.untyped_storage().nbytes() == 0:
            raise RuntimeError(
                "the logits are read for the first time, but the weights or hidden states that make them have changed since the forward "
                "pass: expected output.logits to be read before optimizer.step(), or a call without labels"
            )
        device = self.hidden.device.type
        with torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None):
            logits = F.linear(self.hidden, self.weight, self.bias)
        for step in steps:
            logits = step(logits)
        return logits


class Memory:
    """The numbers of logits, and of all views of them, once something has read one of these."""

    def __init__(self, call: HeadCall, steps: tuple[Step, ...]) -> None:
        self.call, self.steps, self.value = call, steps, None

    def read(self) -> Tensor:
        """In the grad mode of the forward pass."""
        if self.value is None:
            with torch.set_grad_enabled(self.call.grad):
                self.value = self.call.logits(self.steps)
        return self.value


class Form(NamedTuple):
    """What logits stand for: scale * product, or cap * tanh(scale * product), in `dtype`; their rows are made of `rows` [..., H].

    views: what makes them of the numbers in their memory.
    """

    rows: Tensor
    dtype: torch.dtype
    scale: float = 1.0
    cap: float | None = None
    views: tuple[Step, ...] = ()


class DeferredLogits(Tensor):
    """A tensor of logits without numbers, which are made, as the model itself makes them, when something first reads them.

    Shape, type and device are known at once. Scaling by a number, one tanh, casts and views make another one; a cross-entropy of class
    indices reads the hidden states in its place; any other function gets the real tensor, with its place in the graph, and from
    then on all do. A loss that does not pass through the logits has no gradient of them: `retain_grad` is refused, and hooks are not
    called.
    """

    memory: Memory
    form: Form
    value: Tensor | None

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: tuple[type, ...], args: tuple = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        kwargs = kwargs or {}
        if func is Tensor.retain_grad:
            raise RuntimeError(
                "these logits keep no gradient, since the loss does not pass through them: call unpatch_model(model), or the model without "
                "labels"
            )
        if func in WITHOUT_NUMBERS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in FOLLOWED and args and isinstance(args[0], DeferredLogits) and args[0].memory.value is None:
            made = FOLLOWED[func](func, args[0], args[1:], kwargs)
            if made is not None:
                return made
        args, kwargs = tree_map_only(DeferredLogits, DeferredLogits.read, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable, types: tuple[type, ...], args: tuple = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        """For what calls C++ without asking __torch_function__, below autograd."""
        if func._schema.is_mutable:
            raise RuntimeError(
                f"{func} writes into logits that are not made yet: expected a copy of them, logits.clone()"
            )
        args, kwargs = tree_map_only(DeferredLogits, DeferredLogits._numbers, (args, kwargs or {}))
        return func(*args, **kwargs)

    def read(self) -> Tensor:
        """The logits themselves, made at the first call and kept."""
        if self.value is None:
            self.value = self.memory.read()
            with torch.set_grad_enabled(self.memory.call.grad):
                for view in self.form.views:
                    self.value = view(self.value)
        return self.value

    def _numbers(self) -> Tensor:
        """Without their place in the graph, which is not recorded here."""
        if self.memory.value is not None:
            return self.read().detach()
        with torch.no_grad():
            return self.memory.call.logits(self.memory.steps + self.form.views)


class _Placed(torch.autograd.Function):
    """Gives a DeferredLogits its place in the graph, for what differentiates it without reading it through Python."""

    @staticmethod
    def forward(ctx, call: HeadCall, steps: tuple[Step, ...], form: Form, *tensors: Tensor) -> Tensor:
        ctx.call, ctx.steps = call, steps
        shape = *form.rows.shape[:-1], len(call.weight)
        return Tensor._make_wrapper_subclass(DeferredLogits, shape, dtype=form.dtype, device=form.rows.device)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        tensors = [x.detach().requires_grad_(x.requires_grad) for x in ctx.call.tensors]
        hidden, weight, bias = (*tensors, None)[:3]
        wanted = [x for x in tensors if x.requires_grad]
        with torch.enable_grad():
            logits = ctx.call._replace(hidden=hidden, weight=weight, bias=bias).logits(ctx.steps)
        found = iter(torch.autograd.grad(logits, wanted, upstream))
        return None, None, None, *(next(found) if x.requires_grad else None for x in tensors)


def can_defer(head: nn.Linear, hidden: Tensor) -> bool:
    """Whether the fused head takes these tensors."""
    if type(hidden) is not Tensor or hidden.device.type not in DEVICES or not hidden.numel():
        return False
    parameters = [x for x in (head.weight, head.bias) if x is not None]
    tensors = [hidden, *parameters]
    return (
        all(type(x) is nn.Parameter for x in parameters)
        and all(x.dtype in FAST_DTYPES and x.device == hidden.device for x in tensors)
        and (torch.is_autocast_enabled(hidden.device.type) or len({x.dtype for x in tensors}) == 1)
        and hidden.shape[-1] == head.weight.shape[1]
    )


def runs_plainly() -> bool:
    """Whether this is an ordinary call, neither traced for a compiled graph nor transformed by torch.func or in forward mode."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def defer(head: nn.Linear, hidden: Tensor) -> DeferredLogits:
    """Stands for head(hidden), where `can_defer` says so."""
    device = hidden.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    call = HeadCall(hidden, head.weight, head.bias, autocast, torch.is_grad_enabled(), ())
    call = call._replace(versions=_versions(call.tensors))
    return _place(Memory(call, ()), Form(hidden, autocast or hidden.dtype))


def _versions(tensors: list[Tensor]) -> tuple[int, ...]:
    return tuple(0 if x.is_inference() else x._version for x in tensors)


def _place(memory: Memory, form: Form) -> DeferredLogits:
    call = memory.call
    with torch.set_grad_enabled(call.grad):
        made = _Placed.apply(call, memory.steps + form.views, form, *call.tensors)
    made.memory, made.form, made.value = memory, form, None
    return made


def _view(logits: DeferredLogits, step: Step, **changes: object) -> DeferredLogits:
    return _place(logits.memory, logits.form._replace(views=(*logits.form.views, step), **changes))


def _copy(logits: DeferredLogits, step: Step, **changes: object) -> DeferredLogits:
    memory = Memory(logits.memory.call, (*logits.memory.steps, *logits.form.views, step))
    return _place(memory, logits.form._replace(views=(), **changes))


# One function a kind of step: (func, logits, further arguments, keyword arguments) -> what it makes, or None where that takes numbers.


def _scaled(func: Callable, logits: DeferredLogits, rest: tuple, kwargs: Mapping) -> DeferredLogits | None:
    if len(rest) != 1 or kwargs or type(rest[0]) not in (int, float) or not rest[0]:
        return None
    form, factor = logits.form, rest[0] if func in MULTIPLICATIONS else 1 / rest[0]
    changes = {"scale": form.scale * factor} if form.cap is None else {"cap": form.cap * factor}
    return _copy(logits, lambda x: func(x, *rest), **changes)


def _tanh(func: Callable, logits: DeferredLogits, rest: tuple, kwargs: Mapping) -> DeferredLogits | None:
    return None if rest or kwargs or logits.form.cap is not None else _copy(logits, func, cap=1.0)


def _cast(func: Callable, logits: DeferredLogits, rest: tuple, kwargs: Mapping) -> DeferredLogits | None:
    """`.float()`, `.to(dtype)`, `.to(device)` of its own, `.contiguous()`."""
    if kwargs or len(rest) != (func is Tensor.to):
        return None
    asked = torch.float32 if func is Tensor.float else rest[0] if rest else logits.dtype
    if isinstance(asked, torch.device) and asked == logits.device:
        asked = logits.dtype
    if asked not in FAST_DTYPES:
        return None
    made = _view if asked == logits.dtype else _copy
    return made(logits, lambda x: func(x, *rest), dtype=asked)


def _viewed(func: Callable, logits: DeferredLogits, rest: tuple, kwargs: Mapping) -> DeferredLogits | None:
    """`.view(-1, V)`: the same rows, in another shape."""
    shape = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
    if kwargs or len(shape) < 2 or shape[-1] != logits.shape[-1]:
        return None
    rows = logits.form.rows
    try:
        rows = rows.reshape(*shape[:-1], rows.shape[-1])
    except (RuntimeError, TypeError):
        return None
    return _view(logits, lambda x: func(x, *rest), rows=rows)


def _cross_entropy(func: Callable, logits: DeferredLogits, rest: tuple, kwargs: Mapping) -> Tensor | None:
    """The loss of `F.cross_entropy` from the hidden states, where it is of one class index a row and nothing else."""
    options = {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0, **kwargs}
    ignore_index, reduction, smoothing = (options.pop(x) for x in ("ignore_index", "reduction", "label_smoothing"))
    if len(rest) != 1 or smoothing != 0 or any(x is not None for x in options.values()):
        return None
    target, in_autocast = rest[0], logits.dtype != torch.float32 and logits.memory.call.autocast is not None
    if (
        type(target) is not Tensor
        or target.dtype != torch.int64
        or target.dim() != 1
        or logits.dim() != 2
        or in_autocast
    ):
        return None
    try:
        losses = -_token_logprobs(logits, target, ignore_index)
    except (TypeError, ValueError):  # torch has errors of its own
        return None
    losses = losses if reduction == "none" else losses.sum()
    if reduction == "mean":
        losses = losses / (target != ignore_index).sum()
    return losses.to(logits.dtype)


def _token_logprobs(logits: DeferredLogits, labels: Tensor, ignore_index: int) -> Tensor:
    call, form = logits.memory.call, logits.form
    rows, weight = form.rows, call.weight
    if call.autocast is not None and rows.is_cuda:  # the products of autocast's type, as the head's own would be
        rows, weight = rows.to(call.autocast), weight.to(call.autocast)
    scale = form.scale if form.cap is None else form.scale * form.cap
    options = {"softcap": form.cap, "logit_scale": scale, "ignore_index": ignore_index}
    with torch.set_grad_enabled(call.grad and torch.is_grad_enabled()):
        return linear_token_logprobs(rows, weight, labels, call.bias, **options)


MULTIPLICATIONS = (Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul)
FOLLOWED: dict[Callable, Callable] = {
    **dict.fromkeys((*MULTIPLICATIONS, Tensor.div, Tensor.__truediv__, torch.div), _scaled),
    **dict.fromkeys((Tensor.tanh, torch.tanh), _tanh),
    **dict.fromkeys((Tensor.float, Tensor.to, Tensor.contiguous), _cast),
    **dict.fromkeys((Tensor.view, Tensor.reshape), _viewed),
    F.cross_entropy: _cross_entropy,
}
METHODS = "__len__ size dim numel is_contiguous is_floating_point register_hook".split()
ATTRIBUTES = "shape dtype device layout ndim requires_grad grad_fn is_leaf _base is_cpu is_cuda is_meta is_nested is_sparse".split()
WITHOUT_NUMBERS = {getattr(Tensor, x) for x in METHODS} | {getattr(Tensor, x).__get__ for x in ATTRIBUTES}
