"""Packages that only some environments need."""

from __future__ import annotations

import importlib
from types import ModuleType


def imported(module: str, extra: str) -> ModuleType:
    """The module; `extra` is the name of fastppo's extra that installs it. Raises ImportError with that command where it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} cannot be imported ({error}): pip install fastppo[{extra}]") from error
