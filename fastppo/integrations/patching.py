"""Swaps functions of an installed package for ours wherever they are held, and puts them back.

A patched function tries ours; a call that ours refuses (TypeError or ValueError, raised before anything is written) goes to the package's
own function, and the first one of each is logged with its reason: nobody's training stops because of a patch.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

logger = logging.getLogger("fastppo.integrations")

STRICT = "strict"  # keyword-only, where ours differs from a fault of theirs: match the fault
_lock = threading.RLock()


@dataclass(frozen=True)
class Replacement:
    """`ours` takes the place of `target`: "package.module:function" or "package.module:Class.method".

    Both have the same parameters, but for our keyword-only `strict`. `signature` names the function to compare with where that is not
    `target` itself; its first parameter, an autograd function's ctx, is left out. Unless `everywhere`, who else holds the function by a
    name keeps theirs.
    """

    target: str
    ours: Callable
    signature: str | None = None
    everywhere: bool = True


class Patch(Mapping[str, Callable]):
    """What `patch()` replaced: target -> the package's own function. Leaving it as a context manager undoes it, unless the package
    was patched already."""

    def __init__(self, peer: Peer, replaced: Mapping[str, Callable], made: bool) -> None:
        self._peer, self._replaced, self._made = peer, dict(replaced), made

    def __getitem__(self, target: str) -> Callable:
        return self._replaced[target]

    def __iter__(self) -> Iterator[str]:
        return iter(self._replaced)

    def __len__(self) -> int:
        return len(self._replaced)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        if self._made:
            self._peer.unpatch()

    def __repr__(self) -> str:
        return f"<{self._peer.distribution}: {', '.join(self._replaced) or 'nothing'} replaced>"


class Peer:
    """An installed package and our replacements for its functions.

    Args:
        package: the name that is imported.
        distribution: the name that is installed with pip.
        replacements: minor version ("1.16") -> what is replaced there. These versions are the ones that are tested, the newest last.
    """

    def __init__(self, package: str, distribution: str, replacements: Mapping[str, tuple[Replacement, ...]]) -> None:
        self.package, self.distribution, self._replacements = package, distribution, replacements
        self._swaps: list[_Swap] = []
        self._strict = False

    def patch(self, strict: bool = False) -> Patch:
        """Replaces all functions, or none where one of them is not what was tested. Once patched, does nothing.

        Raises:
            ImportError: the package, or a module of it, cannot be imported.
            RuntimeError: another version, another signature, a package that is still being imported, or one that was patched with
                another `strict`.
        """
        with _lock:
            if self._swaps and strict != self._strict:
                raise RuntimeError(f"{self.package} is patched with strict={self._strict}: call unpatch() first")
            made = not self._swaps
            if made:
                swaps = [self._find(replacement, strict) for replacement in self._replacements[self._tested_version()]]
                for swap in swaps:
                    swap.put()
                _swap_names({id(swap.theirs): swap.ours for swap in swaps if swap.everywhere}, self.package)
                self._swaps, self._strict = swaps, strict
            return Patch(self, {swap.target: swap.theirs for swap in self._swaps}, made)

    def unpatch(self) -> None:
        """Puts the package's own functions back wherever ours are held, in modules that were imported since then too."""
        with _lock:
            for swap in self._swaps:
                swap.restore()
            _swap_names({id(swap.ours): swap.theirs for swap in self._swaps}, self.package)
            self._swaps = []

    def _tested_version(self) -> str:
        tested = list(self._replacements)
        pip_line = f"pip install '{self.distribution}=={tested[-1]}.*'"
        if find_spec(self.package) is None:
            raise ImportError(f"{self.distribution} is not installed: {pip_line}", name=self.package)
        try:
            found = version(self.distribution)
        except PackageNotFoundError:
            raise ImportError(
                f"{self.package} is not installed as {self.distribution}, so its version cannot be told: {pip_line}"
            ) from None
        minor = ".".join(found.split(".")[:2])
        if minor not in tested:
            raise RuntimeError(
                f"{self.distribution} is {found}, expected {' or '.join(tested)}, which this fastppo was tested with: {pip_line}"
            )
        return minor

    def _find(self, replacement: Replacement, strict: bool) -> _Swap:
        """Where the replacement goes, once its signature is seen to be the one that was tested."""
        owner, name = self._owner(replacement.target)
        theirs = inspect.signature(getattr(owner, name))
        if replacement.signature is not None:
            compared = inspect.signature(getattr(*self._owner(replacement.signature)))
            theirs = inspect.Signature(list(compared.parameters.values())[1:])
        difference = _difference(_parameters(theirs), _parameters(inspect.signature(replacement.ours)))
        if difference:
            raise RuntimeError(f"{replacement.target} of {self.distribution} {version(self.distribution)} {difference}")
        return _Swap(replacement, owner, name, strict)

    def _owner(self, target: str) -> tuple[ModuleType | type, str]:
        """The module or class that holds the target, and the name that it has there."""
        module_name, path = target.split(":")
        try:
            owner: Any = import_module(module_name)
        except ImportError as error:
            raise ImportError(f"{module_name} cannot be imported: {error}", name=module_name) from error
        if getattr(owner.__spec__, "_initializing", False):
            raise RuntimeError(f"{module_name} is still being imported: call patch() when {self.package} is imported")
        *classes, name = path.split(".")
        for part in [*classes, name]:
            if not hasattr(owner, part):
                raise RuntimeError(f"{module_name} of {self.distribution} {version(self.distribution)} has no {path}")
            owner = getattr(owner, part) if part is not name else owner
        return owner, name


class _Swap:
    """Theirs and ours of one target, and the attribute of a module or class that holds it."""

    def __init__(self, replacement: Replacement, owner: ModuleType | type, name: str, strict: bool) -> None:
        self.target, self.everywhere, self._owner, self._name = replacement.target, replacement.everywhere, owner, name
        self._attribute = vars(owner).get(name)  # None where a class inherits it, as autograd functions do `apply`
        self.theirs: Callable = getattr(owner, name)
        self.ours = _passing_on(replacement, self.theirs, strict)

    def put(self) -> None:
        static = isinstance(self._owner, type) and (
            self._attribute is None or isinstance(self._attribute, staticmethod)
        )
        setattr(self._owner, self._name, staticmethod(self.ours) if static else self.ours)

    def restore(self) -> None:
        if self._attribute is None:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._attribute)


def _passing_on(replacement: Replacement, theirs: Callable, strict: bool) -> Callable:
    """Ours, in the guise of theirs; what ours refuses is passed on to theirs."""
    ours = replacement.ours
    if strict and STRICT in inspect.signature(ours).parameters:
        ours = functools.partial(ours, strict=True)
    told = False

    @functools.wraps(theirs)
    def patched(*args: Any, **kwargs: Any) -> Any:
        nonlocal told
        try:
            return ours(*args, **kwargs)
        except (TypeError, ValueError) as error:
            if not told and not torch.compiler.is_compiling():  # a compiled graph cannot hold a log line
                told = True
                logger.warning("%s runs as its package has it: %s (said once)", replacement.target, error)
        return theirs(*args, **kwargs)

    return patched


def _parameters(signature: inspect.Signature) -> list[str]:
    """Each one's kind, name and default."""
    parameters = [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
    return [f"{one.kind.description} {one}" for one in parameters if one.name != STRICT]


def _difference(theirs: list[str], ours: list[str]) -> str | None:
    if theirs == ours:
        return None
    more = [one for one in theirs if one not in ours]
    less = [one for one in ours if one not in theirs]
    parts = [f"has {', '.join(more)}"] * bool(more) + [f"lacks {', '.join(less)}"] * bool(less)
    return " and ".join(parts or ["has its parameters in another order"]) + ", unlike the version that was tested"


def _swap_names(new: Mapping[int, Callable], package: str) -> None:
    """Replaces functions, by id, wherever a module holds them by a name, and in the tables (dicts) of the package's own modules."""
    for module_name, module in list(sys.modules.items()):
        held = getattr(module, "__dict__", None)
        if not isinstance(held, dict) or module_name.startswith("fastppo.integrations"):
            continue
        _swap_in(held, new)
        if module_name.split(".")[0] == package:
            for table in [value for value in held.values() if type(value) is dict and value is not held]:
                _swap_in(table, new)


def _swap_in(table: dict, new: Mapping[int, Callable]) -> None:
    for key, value in list(table.items()):
        if id(value) in new:
            table[key] = new[id(value)]
