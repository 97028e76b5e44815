"""Imports of packages that need others which are absent, and which nothing that is called here needs."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from unittest import mock

# What the modules of a package's functions import besides, and none of these functions calls.
ASIDE = {"openrlhf": ("aiohttp", "datasets", "deepspeed", "flash_attn", "torchdata", "vllm")}


class StandIns:
    """Finds the modules of absent packages; whatever is imported from one is a mock."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.packages else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return mock.MagicMock(name=spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


@contextmanager
def standing_in(packages: tuple[str, ...]) -> Iterator[None]:
    """Stand-ins for those that are not installed, which are gone afterwards."""
    finder = StandIns(tuple(name for name in packages if find_spec(name) is None))
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        forget(finder.packages)


def forget(packages: tuple[str, ...]) -> None:
    """As if they had not been imported."""
    for name in [name for name in sys.modules if name.split(".")[0] in packages]:
        del sys.modules[name]


def find(target: str) -> Callable:
    """What "package.module:Class.method" names, imported."""
    module, path = target.split(":")
    with standing_in(ASIDE.get(module.split(".")[0], ())):
        return functools.reduce(getattr, path.split("."), import_module(module))
