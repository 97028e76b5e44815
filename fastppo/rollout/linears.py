"""Decode steps of a CPU model by `batch_invariant_linear`: faster for few rows than a library's product, with bits free of the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from fastppo.native.batch_invariant_linear import batch_invariant_linear
from fastppo.ops._backends import FAST_DTYPES, choose


class DecodeSwitch:
    """Whether the model is in a decode step just now."""

    decoding = False


@contextmanager
def decode_linears(model: nn.Module) -> Iterator[DecodeSwitch]:
    """Inside the block, the model's `nn.Linear` layers call our kernel while `switch.decoding` is set; afterwards they are as before.

    Only plain layers of a CPU model are touched: a subclass or a layer with a forward of its own stays what it is.
    """
    switch = DecodeSwitch()
    layers = [module for module in model.modules() if type(module) is nn.Linear and _is_served(module)]
    for layer in layers:
        layer.__dict__["forward"] = _forward(layer, switch)
    try:
        yield switch
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def _is_served(layer: nn.Linear) -> bool:
    weight = layer.weight
    fits = "forward" not in layer.__dict__ and weight.is_contiguous() and weight.dtype in FAST_DTYPES
    return fits and weight.device.type == "cpu" and choose("batch_invariant_linear", weight) == "cpu"


def _forward(layer: nn.Linear, switch: DecodeSwitch) -> Callable[[Tensor], Tensor]:
    weight, bias = layer.weight, layer.bias

    def forward(x: Tensor) -> Tensor:
        if switch.decoding and x.dtype == weight.dtype:
            return batch_invariant_linear(x, weight, bias)
        return F.linear(x, weight, bias)

    return forward
