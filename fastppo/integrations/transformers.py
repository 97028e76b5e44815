"""Transformers' causal language models on our ops.

`patch_model(model)` gives the loss of one model the fused head. The model's own forward runs as it is, whatever the family: only its
output layer's logits are deferred (see `deferred_logits`), and the cross-entropy that the model itself calls reads the hidden
states in their place. What is done with the logits besides is done with real ones.
"""

from __future__ import annotations

import functools
import inspect
import threading
from contextvars import ContextVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastppo.integrations.deferred_logits import can_defer, defer, runs_plainly
from fastppo.integrations.patching import logger

_MARK = "_fastppo_head"  # in a patched class: the name of the output layer
_computing_loss: ContextVar[PreTrainedModel | None] = ContextVar("computing_loss", default=None)
_lock = threading.RLock()


class ModelPatch:
    """What `patch_model` did. As a context manager it gives the model, and undoes the patch afterwards unless it was there before."""

    def __init__(self, model: nn.Module, made: bool) -> None:
        self.model, self._made = model, made

    def __enter__(self) -> nn.Module:
        return self.model

    def __exit__(self, *_: object) -> None:
        if self._made:
            unpatch_model(self.model)


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
    inner = _language_model(model)
    with _lock:
        made = not _is_patched(inner)
        if made:
            inner.__class__ = _patched_class(type(inner), _head_name(inner))
    return ModelPatch(model, made)


def unpatch_model(model: nn.Module) -> None:
    """The model as it was before `patch_model`; nothing where it was not patched."""
    inner = _language_model(model)
    with _lock:
        if _MARK in vars(type(inner)):
            inner.__class__ = type(inner).__base__
        elif _is_patched(inner):
            raise RuntimeError(
                f"{type(inner).__name__} was given another class after patch_model: undo that before unpatch_model"
            )


def _language_model(model: nn.Module) -> PreTrainedModel:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = next((module for module in modules if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise TypeError(
            f"model is {type(model).__name__}, expected a transformers.PreTrainedModel or a module with one"
        )
    return found


def _is_patched(model: PreTrainedModel) -> bool:
    return hasattr(type(model), _MARK)


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
    """A subclass, of the same name, for one model: files, signatures and tables of classes see no difference."""
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

    def reduce(self, protocol):
        """Copies and pickles are patched too: by the original class, which can be imported."""
        _, _, *state = super(patched, self).__reduce_ex__(4)
        return _new, (original, head_name), *state

    patched = type(
        original.__name__,
        (original,),
        {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "__reduce_ex__": reduce,
            "forward": forward,
            head_name: property(head),
            _MARK: head_name,
        },
    )
    return patched


def _new(original: type[PreTrainedModel], head_name: str) -> PreTrainedModel:
    patched = _patched_class(original, head_name)
    return patched.__new__(patched)
