"""One reward function: its name, the keywords it takes, its answer checked and turned into floats."""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import itertools
import math
import numbers
import reprlib
import traceback
from collections.abc import Callable, Mapping, Set
from decimal import Decimal
from typing import Any

import torch

from fastppo.rewards.event_loop import wait_for

Scores = list[float | None]


class NoScore(float):
    """NaN, an invalid score, with the reason why there is none: `NoScore("it is too long")`."""

    def __new__(cls, reason: str) -> NoScore:
        score = super().__new__(cls, math.nan)
        score.reason = reason
        return score


_UNORDERED_OR_TEXT = str | bytes | bytearray | memoryview | Mapping | Set

OURS = "fastppo.rewards."
"""Where the module of a ready-made function stands: its options are keyword-only, and no column of the data is taken for one."""

OWN_ARGUMENTS = ("prompts", "completions", "completion_ids")
"""What every reward function is offered; the data's columns have other names."""

TRACEBACK_FRAMES = 3
MESSAGE_CHARACTERS = 2000

_SHORT = reprlib.Repr()  # takes no time over long values, and survives a __repr__ that raises
_SHORT.maxstring = _SHORT.maxother = 80


class RewardFunction:
    """A function that follows TRL's convention, `fn(prompts, completions, **columns) -> list[float | None]`, sync or async.

    `in_process` is what its attribute of that name says: it must not leave the process that it was made in.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        """Raises TypeError for anything that is no function to be called with keywords, ValueError for one whose signature does not fit; for
        a function of ours also what it raises of options that do not fit, or of a package that is missing."""
        _refuse_what_is_no_function(function)
        self.name = name
        self._function = function
        self._parameters = _keyword_parameters(function, name)
        kinds = {parameter.kind for parameter in self._parameters.values()}
        self._takes_all = inspect.Parameter.VAR_KEYWORD in kinds
        self.in_process = bool(getattr(unbound(function), "in_process", False))
        self._options = set(function.keywords) if isinstance(function, functools.partial) else set()
        if str(getattr(unbound(function), "__module__", "")).startswith(OURS):
            self._try_options()

    def select(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `arguments` that the signature names, or all where it has **kwargs; none in place of what is bound.

        Raises ValueError naming the first parameter that nothing was given for.
        """
        for name, parameter in self._parameters.items():
            if _is_required(parameter) and name not in arguments:
                raise ValueError(
                    f"reward {self.name!r} asks for {name!r}, expected one of {', '.join(map(repr, arguments))}"
                    + _did_you_mean(name, arguments)
                )
        asked = {name: value for name, value in arguments.items() if self._takes_all or name in self._parameters}
        return {name: value for name, value in asked.items() if name not in self._options}

    def _try_options(self) -> None:
        """Call a function of ours for no completions, so that what is wrong with its options is said before the run. Its **columns would pass
        over an option that it has not."""
        known = [name for name, parameter in self._parameters.items() if parameter.kind not in _VARIADIC]
        for name in self._options - set(known):
            options = [name for name in known if self._parameters[name].kind is inspect.Parameter.KEYWORD_ONLY]
            raise ValueError(
                f"reward {self.name!r} has no option {name!r}, expected {', '.join(options) or 'none'}"
                + _did_you_mean(name, dict.fromkeys(options))
            )
        for name, parameter in self._parameters.items():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                self._options.add(name)
                if _is_required(parameter):
                    raise ValueError(
                        f"reward {self.name!r} needs {name}: bind it with functools.partial, or under `arguments` in a recipe"
                    )
        columns = [name for name, parameter in self._parameters.items() if _is_required(parameter)]
        try:
            self._function(**{name: [] for name in columns})
        except (TypeError, ValueError) as error:
            error.args = (f"reward {self.name!r}: {error}",)
            raise

    def answer(self, keywords: Mapping[str, Any], expected: int) -> dict[str, Any]:
        """Call the function once: {"scores": [float or None] * expected} or {"error": text}; both survive a trip through JSON.

        It gets copies of all values, so that nothing it does to them reaches another function, a retry, the data set, or another
        sample of the same row. Raises KeyboardInterrupt alone.
        """
        try:
            result = self._function(**{name: [_own_copy(v) for v in values] for name, values in keywords.items()})
            if inspect.isawaitable(result):
                result = wait_for(result)
            return {"scores": to_scores(result, expected)}
        except BadScores as error:
            return {"error": str(error)}
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit, CancelledError, ...: no way of giving up ends the run
            return {"error": describe(error)}


class BadScores(ValueError):
    """A reward function returned something other than one number or None for each completion."""


def to_scores(result: Any, expected: int) -> Scores:
    """A list, tuple, tensor, array, series or generator of `expected` numbers or None -> floats or None.

    Raises BadScores with the expected and the actual number, or with the first element that is no number.
    """
    if isinstance(result, _UNORDERED_OR_TEXT) or not hasattr(result, "__iter__"):
        raise BadScores(f"returned {_show(result)}, expected a list of {expected} numbers or None")
    if getattr(result, "ndim", 1) != 1:
        raise BadScores(f"returned {type(result).__name__} of shape {tuple(result.shape)}, expected ({expected},)")
    values = list(itertools.islice(result.tolist() if hasattr(result, "tolist") else result, expected + 1))
    if len(values) != expected:
        found = len(values) if len(values) < expected else len(result) if hasattr(result, "__len__") else "more"
        raise BadScores(f"returned {found} scores, expected {expected}, one for each completion")
    return [_to_score(value, index) for index, value in enumerate(values)]


def _to_score(value: Any, index: int) -> float | None:
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a 0-d tensor or a NumPy scalar
        value = value.item()
    if value is None or isinstance(value, NoScore):
        return value
    if not isinstance(value, numbers.Real | Decimal):
        raise BadScores(f"returned {_show(value)} for completion {index}, expected a number or None")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _own_copy(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:  # a lock, an open file: it can only be what it is
        return value


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is inspect.Parameter.empty and parameter.kind not in _VARIADIC


def unbound(function: Any) -> Any:
    """The function itself, where arguments are bound to it."""
    return function.func if isinstance(function, functools.partial) else function


def _refuse_what_is_no_function(function: Any) -> None:
    inner = unbound(function)
    if isinstance(inner, torch.nn.Module):
        raise TypeError(
            f"reward function is a model, {type(inner).__name__}, expected a function that asks it: fastppo.rewards.RewardModel(model, tokenizer) "
            "where it has one label, else one of yours, which returns a list of numbers, one for each completion (docs/rewards.md)"
        )
    if isinstance(inner, type):
        raise TypeError(
            f"reward function is the class {inner.__name__}, expected a function or an object that can be called: {inner.__name__}(...)"
        )
    if not callable(inner):
        raise TypeError(f"reward function is {_show(function)}, expected a callable")


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


def describe(error: BaseException) -> str:
    """Type, text and the last frames of where it was raised."""
    text = _text_of(error)
    if "CUDA" in text and "fork" in text:
        text += " (a reward that needs the GPU runs in this process: reward.timeout=None)"
    # The first frame is ours.
    frames = traceback.extract_tb(error.__traceback__)[1:][-TRACEBACK_FRAMES:]
    inner = [f"{type(part).__name__}: {_text_of(part)}" for part in getattr(error, "exceptions", ())[:TRACEBACK_FRAMES]]
    return "\n".join(
        [f"{type(error).__name__}: {text}", *inner, *(line.rstrip() for line in traceback.format_list(frames))]
    )


def _text_of(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception as problem:
        return f"its text cannot be had, {type(problem).__name__}"
    return text if len(text) <= MESSAGE_CHARACTERS else text[:MESSAGE_CHARACTERS] + " ..."


def _show(value: Any) -> str:
    return f"{type(value).__name__} {_SHORT.repr(value)}"


def _did_you_mean(name: str, names: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
