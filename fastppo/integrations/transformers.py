"""Transformers' causal language models on our ops.

`patch_model(model)` gives the loss of one model the fused head. The model's own forward runs as it is, whatever the family: only its
output layer's logits are deferred (see `deferred_logits`), and the cross-entropy that the model itself calls reads the hidden
states in their place. What is done with the logits besides is done with real ones. `patch_layers(model)` gives a Llama-like model
what lies below (see `transformers_layers`).
"""

from __future__ import annotations

import functools
import inspect
from contextvars import ContextVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastppo.integrations.deferred_logits import can_defer, defer, runs_plainly
from fastppo.integrations.model_patch import ModelPatch, language_model, lock, restore_class, subclass
from fastppo.integrations.patching import logger
from fastppo.integrations.transformers_layers import patch_layers, unpatch_layers

__all__ = ["ModelPatch", "patch_layers", "patch_model", "unpatch_layers", "unpatch_model"]

_MARK = "_fastppo_head"  # in a patched class: the name of the output layer
_computing_loss: ContextVar[PreTrainedModel | None] = ContextVar("computing_loss", default=None)


def patch_model(model: nn.Module) -> ModelPatch:
    """Where `model(...)` is given labels, its loss comes from `linear_token_logprobs`: no logits, nor their gradient, exist as a whole.

    The loss is the model's own in every option (shift, ignored labels, num_items_in_batch, scales and soft-capping, losses besides),
    but for roundings, of which it has fewer. `output.logits` stays a tensor of the same shape and type; its numbers are made when
    something first reads them, from hidden states that the output keeps. Nothing else of the model changes: calls without labels,
    `generate`, names, files. A compiled forward runs as before.

    Args:
        model: a PreTrainedModel with an output layer and a forward that takes labels, or what wraps one (an adapter's model, DDP). Its
            parameters may be replaced and moved afterwards. A model that is patched stays as it is.

    Raises:
        TypeError: there is no PreTrainedModel in it.
        ValueError: its forward takes no labels, or its output layer is not a plain torch.nn.Linear of its own; one that becomes so
            later, as by an adapter on it, runs as Transformers has it.

    Differences from the model's own:
        - the logits have to be read before the weights change (a RuntimeError says so), and none of the loss's gradient passes through
          them: `retain_grad` on them is an error, hooks on them are not called for the loss.
        - the loss has no second derivative (create_graph=True is an error).
    """
    inner = language_model(model)
    with lock:
        if hasattr(type(inner), _MARK):
            return ModelPatch(model, None)
        inner.__class__ = _patched_class(type(inner), _head_name(inner))
    return ModelPatch(model, unpatch_model)


def unpatch_model(model: nn.Module) -> None:
    """The model as it was before `patch_model`; nothing where it was not patched."""
    restore_class(language_model(model), _MARK, "patch_model")


def _head_name(model: PreTrainedModel) -> str:
    """The name that the output layer has in the model; ValueError where its logits or loss cannot be ours."""
    name, head = type(model).__name__, model.get_output_embeddings()
    if "labels" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{name} computes no loss: its forward takes no labels")
    if "forward" in vars(model):
        raise ValueError(
            f"{name} has a forward of its own, which would be passed over: patch it before whatever gave it that"
        )
    found = next((child for child, module in model.named_children() if module is head), None)
    if found is None:
        raise ValueError(f"{name} has no output layer of its own that makes logits")
    if not _is_plain(head):
        raise ValueError(
            f"the output layer {found} of {name} is {type(head).__module__}.{type(head).__qualname__}, expected a plain torch.nn.Linear "
            "without hooks or adapters"
        )
    return found


def _is_plain(head: nn.Module) -> bool:
    """A torch.nn.Linear that does what its class says."""
    hooks = head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks
    return type(head) is nn.Linear and "forward" not in vars(head) and not any(hooks)


class _DeferringHead:
    """The output layer while a loss is computed."""

    def __init__(self, head: nn.Module) -> None:
        self._head = head

    def __call__(self, hidden: Tensor, *args: object, **kwargs: object) -> Tensor:
        if _is_plain(self._head) and not (args or kwargs) and can_defer(self._head, hidden):
            return defer(self._head, hidden)
        _tell(type(self._head).__name__, getattr(hidden, "dtype", None))
        return self._head(hidden, *args, **kwargs)

    def __getattr__(self, name: str) -> object:
        return getattr(self._head, name)


@functools.cache
def _tell(head: str, dtype: object) -> None:
    logger.warning(
        "an output layer (%s, of hidden states in %s) runs as Transformers has it: expected a plain linear layer in float32, bfloat16 or "
        "float16 (said once)",
        head,
        dtype,
    )


@functools.cache
def _patched_class(original: type[PreTrainedModel], head_name: str) -> type[PreTrainedModel]:
    """Of every model of that class."""
    labels_place = list(inspect.signature(original.forward).parameters).index("labels") - 1

    @functools.wraps(original.forward)
    def forward(self, *args, **kwargs):
        labels = args[labels_place] if len(args) > labels_place else kwargs.get("labels")
        if labels is None or not runs_plainly():
            return original.forward(self, *args, **kwargs)
        token = _computing_loss.set(self)
        try:
            return original.forward(self, *args, **kwargs)
        finally:
            _computing_loss.reset(token)

    def head(self) -> nn.Module | _DeferringHead:
        module = nn.Module.__getattr__(self, head_name)
        return _DeferringHead(module) if runs_plainly() and _computing_loss.get() is self else module

    members = {"forward": forward, head_name: property(head), _MARK: head_name}
    return subclass(original, members, _patched_class, head_name)
