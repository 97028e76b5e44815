"""What an environment is, how it is called, and what it may answer."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple, Protocol

import numpy as np

from fastppo.rewards.result import LARGEST_SCORE

Message = dict[str, Any]
Observation = str | list[Message] | None
"""A text, messages of a conversation, or None for nothing to say."""


TOOL = "tool"
"""Role of the messages that tools answer with."""


class Environment(Protocol):
    """What a policy talks to, with the calls of Gymnasium. One object plays one episode at a time, and after a `reset` the next; it is made and
    called in one thread of its own. Either method may be `async`. A method `close()`, where there is one, ends it; it may be called from
    another thread when a call hangs, and is to end what that call waits for.

    An environment with the attribute `tools`, schemas of functions as Transformers' `get_json_schema` makes them, shows these to the policy, and
    `step` gets the assistant's message instead of a text: a dict with `content`, `tool_calls` where it calls some, or `parse_error`.

    A Gymnasium environment over texts is one as it is: its `reset(seed=..., options=...)`, whose options are the row, may return
    `(observation, info)`.
    """

    def reset(self, row: Mapping[str, Any], seed: int) -> Observation:
        """Begin an episode and return what the policy reads first; None stands for the row's prompt.

        Args (each is given where the signature has its name):
            row: the columns of the episode's row of the data, `prompt` among them.
            seed: all chance of the episode is to come from it. The samples of one prompt have the same.
        """
        ...

    def step(self, completion: str) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """(observation, reward, terminated, truncated, info) of what the policy said, without special tokens."""
        ...


class ToolGone(Exception):
    """What a tool raises that answers no more calls: nothing that the model could do helps, and the episode is invalid."""


class Step(NamedTuple):
    """What `Environment.step` returns, checked."""

    observation: Observation
    reward: float
    terminated: bool
    truncated: bool
    info: Mapping[str, Any]


def reset(environment: Any, *, row: Mapping[str, Any], seed: int) -> Any:
    """Call `reset` with those arguments that its signature names; what it returns is still to be checked, and may be awaited first."""
    own = copy.deepcopy({name: value for name, value in row.items() if name != "prompt_ids"})
    offered = {"row": own, "seed": seed, "options": own}
    parameters = inspect.signature(environment.reset).parameters.values()
    if not any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        offered = {name: offered[name] for name in offered if name in {parameter.name for parameter in parameters}}
    return environment.reset(**offered)


def after_prompt(prompt: str | list[Message], text: str) -> str | list[Message]:
    """The row's prompt, text or messages, with `text` appended to it or to its last message."""
    if isinstance(prompt, str):
        return prompt + text
    messages = [dict(message) for message in prompt]
    messages[-1]["content"] = (messages[-1].get("content") or "") + text
    return messages


def to_first_observation(returned: Any) -> Observation:
    """What `reset` returned, without Gymnasium's info. Raises TypeError for anything else."""
    if isinstance(returned, tuple):
        if len(returned) != 2 or not isinstance(returned[1], Mapping):
            raise TypeError(f"reset returned {_shown(returned)}, expected an observation or (observation, info)")
        returned = returned[0]
    return to_observation(returned, "reset returned")


def to_step(returned: Any) -> Step:
    """What `step` returned. Raises TypeError or ValueError naming the entry that is wrong."""
    if not isinstance(returned, tuple) or len(returned) != 5:
        raise TypeError(
            f"step returned {_shown(returned)}, expected (observation, reward, terminated, truncated, info), five entries"
        )
    observation, reward, terminated, truncated, info = returned
    for name, flag in (("terminated", terminated), ("truncated", truncated)):
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(f"{name} of step is {_shown(flag)}, expected True or False")
    if not isinstance(info, Mapping):
        raise TypeError(f"info of step is {_shown(info)}, expected a dict")
    return Step(
        to_observation(observation, "the observation of step is"),
        to_reward(reward, "reward of step"),
        bool(terminated),
        bool(truncated),
        info,
    )


def to_reward(value: Any, name: str) -> float:
    """Raises TypeError for what is no number, ValueError for one that cannot be trained on."""
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if not isinstance(value, Real):
        raise TypeError(f"{name} is {_shown(value)}, expected a number")
    if not math.isfinite(value) or abs(value) > LARGEST_SCORE:
        raise ValueError(f"{name} is {value}, expected a finite number of at most {LARGEST_SCORE:g} in size")
    return float(value)


def to_observation(value: Any, what: str) -> Observation:
    """Raises TypeError, beginning with `what`, for what is none."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in value):
        return [dict(message) for message in value]
    raise TypeError(f"{what} {_shown(value)}, expected a text, a list of messages (dicts with a role), or None")


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"
