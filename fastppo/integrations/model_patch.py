"""Patches of one model: a module is given a subclass of its class, which copies and pickles keep and undoing takes away."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from torch import nn
from transformers import PreTrainedModel

lock = threading.RLock()  # held while classes change


class ModelPatch:
    """What a patch did. As a context manager it gives the model, and undoes the patch afterwards unless it was there before."""

    def __init__(self, model: nn.Module, undo: Callable[[nn.Module], None] | None) -> None:
        """undo: of the model; None where the patch was there before."""
        self.model, self._undo = model, undo

    def __enter__(self) -> nn.Module:
        return self.model

    def __exit__(self, *_: object) -> None:
        if self._undo is not None:
            self._undo(self.model)


def language_model(model: nn.Module) -> PreTrainedModel:
    """The outermost PreTrainedModel in it; TypeError where there is none."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = next((module for module in modules if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise TypeError(
            f"model is {type(model).__name__}, expected a transformers.PreTrainedModel or a module with one"
        )
    return found


def subclass(
    original: type[PreTrainedModel], members: Mapping[str, object], make: Callable[..., type], *arguments: object
) -> type[PreTrainedModel]:
    """A subclass with those members, of the same name: files, signatures and tables of classes see no difference.

    make(original, *arguments), a function of a module, gives this class again where a copy or a pickle is read.
    """

    def reduce(self, protocol):
        """By the original class, which can be imported."""
        _, _, *state = super(patched, self).__reduce_ex__(4)
        return _new, (make, original, *arguments), *state

    same = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    patched = type(original.__name__, (original,), {**same, **members, "__reduce_ex__": reduce})
    return patched


def _new(make: Callable[..., type], *arguments: object) -> PreTrainedModel:
    patched = make(*arguments)
    return patched.__new__(patched)


def restore_class(module: PreTrainedModel, mark: str, patch: str) -> None:
    """The module's class as it was before the patch whose subclass has the attribute `mark`; nothing where there is none."""
    with lock:
        if mark in vars(type(module)):
            module.__class__ = type(module).__base__
        elif hasattr(type(module), mark):
            raise RuntimeError(
                f"{type(module).__name__} was given another class after {patch}: undo that before un{patch}"
            )
