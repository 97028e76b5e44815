"""Functions that the policy may call: as an environment of their own, or as the methods of one as TRL has them."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers.utils import get_json_schema

from fastppo.envs.environment import TOOL, Message, Observation, ToolGone, after_prompt

Function = Callable[..., Any]
OWN_METHODS = {"reset", "get_reward", "close"}  # of a world: no tools


class TextMaker(ABC):
    """Makes environments that say texts or messages and have no tools."""

    answers = True
    """Whether one ever says anything upon a turn."""

    @abstractmethod
    def __call__(self) -> Any:
        """An environment."""


class ToolMaker(ABC):
    """Makes environments that have tools and pay nothing."""

    @abstractmethod
    def __call__(self) -> Any:
        """A `ToolDialogue`, which may have to be awaited first."""


class Tools(ToolMaker):
    """Makes environments in which the policy calls functions until it answers without a call: `PPOTrainer(environment=Tools(add), reward=...)`.

    Each function has type hints and a docstring in Google's style, of which Transformers' `get_json_schema` makes what the model reads. It may be
    `async`. What it raises the model reads, and so it does when it calls a function that does not exist.
    """

    def __init__(self, *functions: Function) -> None:
        """Raises ValueError for none, or two of one name; TypeError for what is no function, or has no readable schema."""
        if not functions:
            raise ValueError("there is no function, expected at least one")
        schemas(functions)
        self._functions = functions

    def __call__(self) -> ToolEnvironment:
        return ToolEnvironment(self._functions)


class ToolDialogue(ABC):
    """An environment over messages: `step` takes the assistant's message and calls what its `tool_calls` name. One without ends the episode.

    It pays nothing for a call. What `call` raises the model reads, but for `ToolGone`.
    """

    tools: list[dict[str, Any]]
    """What the model reads of them: schemas as Transformers' `get_json_schema` makes them."""

    @abstractmethod
    async def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """What the tool, one of `tools`, answers."""

    async def reset(self, row: Mapping[str, Any], seed: int) -> Observation:
        """The row's prompt."""
        return None

    async def step(self, message: Message) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Answers with one message for each call, in their order."""
        if "parse_error" in message:
            return [_answer("unknown", f"Error: {message['parse_error']}")], 0.0, False, False, {}
        calls = message.get("tool_calls") or []
        answers = [await self._answered(call) for call in calls]
        return answers, 0.0, not calls, False, {}

    async def _answered(self, call: Any) -> Message:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        known = function if isinstance(function, Mapping) else {}
        name, arguments = known.get("name"), known.get("arguments") or {}
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            return _answer("unknown", f"Error: {call!r} is no call, expected a name and an object of arguments")
        names = [tool["function"]["name"] for tool in self.tools]
        if name not in names:
            return _answer(name, f"Error: there is no tool {name!r}, expected one of {', '.join(names)}")
        try:
            return _answer(name, await self.call(name, arguments))
        except ToolGone:
            raise
        except Exception as error:  # the model's to deal with
            return _answer(name, f"Error: {type(error).__name__}: {error}")


class ToolEnvironment(ToolDialogue):
    """Functions as tools. `world`, an object with methods as TRL's environments have them, may pay in the end by `get_reward()`."""

    def __init__(self, functions: Sequence[Function], world: Any = None) -> None:
        self._functions = {function.__name__: function for function in functions}
        self.tools = schemas(functions)
        self._world = world
        for name in ("get_reward", "close"):
            if callable(own := getattr(world, name, None)):
                setattr(self, name, own)

    async def reset(self, row: Mapping[str, Any], seed: int) -> Observation:
        """The row's prompt; a text that the world's `reset` returns is appended to its last message."""
        if self._world is None:
            return None
        said = await _result(self._world.reset(**_accepted(self._world.reset, row | {"seed": seed}, row)))
        if said is None:
            return None
        if not isinstance(said, str):
            raise TypeError(f"reset returned {type(said).__name__}, expected a text or None")
        return after_prompt(row["prompt"], said)

    async def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        return str(await _result(self._functions[name](**arguments)))


def as_environment(made: Any) -> Any:
    """What a factory made, as an environment: an object without `step` has its public methods as tools."""
    if callable(getattr(made, "step", None)):
        return made
    if not callable(getattr(made, "reset", None)):
        raise TypeError(f"{type(made).__name__} has neither step nor reset, expected an environment")
    return ToolEnvironment(methods_of(made), made)


def methods_of(world: Any) -> list[Function]:
    """The public methods that are tools."""
    names = [name for name, _ in inspect.getmembers(type(world), inspect.isfunction)]  # properties stay as they are
    return [getattr(world, name) for name in names if not name.startswith("_") and name not in OWN_METHODS]


def has_tools(factory: Any) -> bool:
    """Whether it is known before it makes anything that this will have tools."""
    return isinstance(factory, ToolMaker) or isinstance(factory, type) and not callable(getattr(factory, "step", None))


def pays(factory: Any) -> bool:
    """False where it is known before it makes anything that this will pay nothing."""
    return not has_tools(factory) or callable(getattr(factory, "get_reward", None))


def schemas(functions: Sequence[Function]) -> list[dict[str, Any]]:
    """Raises TypeError or ValueError naming the function that cannot be described."""
    names: set[str] = set()
    for function in functions:
        if not callable(function) or not hasattr(function, "__name__"):
            raise TypeError(f"a tool is {type(function).__name__}, expected a function with a name")
        if function.__name__ in names:
            raise ValueError(f"two tools are called {function.__name__}, expected a name for each")
        names.add(function.__name__)
    return [_schema(function) for function in functions]


def _schema(function: Function) -> dict[str, Any]:
    try:
        return get_json_schema(function)
    except Exception as error:  # Transformers' own kinds
        raise TypeError(
            f"the tool {function.__name__} cannot be described: {error} (expected type hints and a docstring with Args)"
        ) from error


def _accepted(function: Function, offered: Mapping[str, Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `offered` that a function's signature names; the columns of the row where it takes any keyword."""
    parameters = inspect.signature(function).parameters
    named = {name: value for name, value in offered.items() if name in parameters}
    if any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(columns) | named
    return named


async def _result(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def _answer(name: str, content: str) -> Message:
    return {"role": TOOL, "name": name, "content": content}
