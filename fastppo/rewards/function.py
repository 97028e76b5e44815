"""One reward function: its name, the keywords it takes, its answer checked and turned into floats."""

from __future__ import annotations

import asyncio
import difflib
import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

Scores = list[float | None]

OWN_ARGUMENTS = ("prompts", "completions", "completion_ids")
"""What every reward function is offered; the data's columns have other names."""

TRACEBACK_FRAMES = 3
MESSAGE_CHARACTERS = 2000


class RewardFunction:
    """A function that follows TRL's convention, `fn(prompts, completions, **columns) -> list[float | None]`, sync or async."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        """Raises TypeError for anything that cannot be called with keywords."""
        if not callable(function):
            raise TypeError(f"reward function is {function!r}, expected a callable")
        self.name = name
        self._function = function
        self._parameters = _keyword_parameters(function, name)
        kinds = {parameter.kind for parameter in self._parameters.values()}
        self._takes_all = inspect.Parameter.VAR_KEYWORD in kinds

    def select(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `arguments` that the signature names, or all where it has **kwargs.

        Raises ValueError naming the first parameter that nothing was given for.
        """
        for name, parameter in self._parameters.items():
            required = parameter.default is inspect.Parameter.empty and parameter.kind not in _VARIADIC
            if required and name not in arguments:
                raise ValueError(
                    f"reward {self.name!r} asks for {name!r}, expected one of {', '.join(map(repr, arguments))}"
                    + _did_you_mean(name, arguments)
                )
        return {name: value for name, value in arguments.items() if self._takes_all or name in self._parameters}

    def answer(self, keywords: Mapping[str, Any], expected: int) -> dict[str, Any]:
        """Call the function once: {"scores": [float or None] * expected} or {"error": text}; both survive a trip through JSON."""
        try:
            result = self._function(**keywords)
            if inspect.isawaitable(result):
                result = _wait_for(result)
            return {"scores": to_scores(result, expected)}
        except BadScores as error:
            return {"error": str(error)}
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            return {"error": _describe(error)}


class BadScores(ValueError):
    """A reward function returned something other than one number or None for each completion."""


def to_scores(result: Any, expected: int) -> Scores:
    """A list, tuple, tensor, array, series or generator of `expected` numbers or None -> floats or None.

    Raises BadScores with the expected and the actual number, or with the first element that is no number.
    """
    if isinstance(result, str | bytes | Mapping) or not hasattr(result, "__iter__"):
        raise BadScores(f"returned {_show(result)}, expected a list of {expected} numbers or None")
    values = result.tolist() if hasattr(result, "tolist") else list(result)
    if not isinstance(values, list) or len(values) != expected:
        found = len(values) if isinstance(values, list) else 0
        raise BadScores(f"returned {found} scores, expected {expected}, one for each completion")
    return [_to_score(value, index) for index, value in enumerate(values)]


def _to_score(value: Any, index: int) -> float | None:
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a 0-d tensor or a NumPy scalar
        value = value.item()
    if value is None:
        return None
    if not isinstance(value, numbers.Real):
        raise BadScores(f"returned {_show(value)} for completion {index}, expected a number or None")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _wait_for(awaitable: Any) -> Any:
    async def wait() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    with ThreadPoolExecutor(1) as pool:  # called in-process from a notebook, whose own loop is busy with us
        return pool.submit(asyncio.run, wait()).result()


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _keyword_parameters(function: Callable[..., Any], name: str) -> dict[str, inspect.Parameter]:
    try:
        parameters = dict(inspect.signature(function).parameters)
    except (TypeError, ValueError) as error:
        raise ValueError(f"reward {name!r} has no signature to read ({error}), expected a Python function") from error
    for parameter in parameters.values():
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise ValueError(
                f"reward {name!r} takes {parameter.name!r} by position only, expected keywords: "
                "prompts, completions, completion_ids and the data's columns"
            )
    return parameters


def _describe(error: BaseException) -> str:
    text = str(error)
    if len(text) > MESSAGE_CHARACTERS:
        text = text[:MESSAGE_CHARACTERS] + " ..."
    if "CUDA" in text and "fork" in text:
        text += " (a reward that needs the GPU runs in this process: timeout=None)"
    # The first frame is ours.
    frames = traceback.extract_tb(error.__traceback__)[1:][-TRACEBACK_FRAMES:]
    return "\n".join([f"{type(error).__name__}: {text}", *(line.rstrip() for line in traceback.format_list(frames))])


def _show(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:80] + ' ...'}"


def _did_you_mean(name: str, names: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
