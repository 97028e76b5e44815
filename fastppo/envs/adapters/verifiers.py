"""Environments of verifiers: tasks, conversations about them, and what they are paid."""

from __future__ import annotations

import asyncio
import inspect
import itertools
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from types import ModuleType
from typing import Any

from fastppo.envs.adapters.optional import imported
from fastppo.envs.environment import Message, Observation
from fastppo.envs.tools import TextMaker

TASK = "task"  # the column of a row that says which task it is


class Verifiers(TextMaker):
    """Makes episodes of an environment of verifiers 0.4: `Verifiers("my-taskset", split="train")`. The policy takes the environment's one seat, in
    place of a program that asks a model ("harness"); what the environment says it reads as the user's messages, and its rewards are paid in the end.

    `PPOTrainer(environment=environment, prompts=environment.rows())`: a row is a task.

    Args:
        taskset: the id of an installed taskset. environment: that of an environment to play its tasks in, in place of its own.
        size: how many of its tasks are taken; all by default. settings: of the taskset's configuration.

    Raises:
        ImportError: verifiers is missing. ModuleNotFoundError: there is no such taskset. ValueError: settings that it does not take, an endless
            taskset without a size, or one that needs what only a harness has: several seats, tools, a runtime.
    """

    def __init__(self, taskset: str, environment: str = "", size: int | None = None, **settings: Any) -> None:
        library = imported("verifiers.v1", "verifiers")
        kind = library.env_config_type(taskset, environment)
        self._library = library
        self._env = library.load_environment(kind(id=environment, taskset={"id": taskset, **settings}))
        if size is None and not self._env.taskset.bounded:
            raise ValueError(f"size is None, expected a number: the taskset {taskset} has no end")
        self._tasks = list(itertools.islice(self._env.taskset, size))
        self._refuse_what_needs_a_harness()

    def rows(self) -> list[dict[str, Any]]:
        """Prompts for the trainer: the tasks in their order."""
        return [
            {"prompt": task.data.prompt_text or task.data.name or f"task {index}", TASK: index}
            for index, task in enumerate(self._tasks)
        ]

    def __call__(self) -> VerifiersEnvironment:
        return VerifiersEnvironment(self._library, self._env, self._tasks)

    def _refuse_what_needs_a_harness(self) -> None:
        hint = "serve the policy to verifiers' own programs instead: fastppo serve"
        taskset, kind = self._env.taskset, type(self._env.taskset).task_type()
        seats = [name for name, value in self._env.config if isinstance(value, self._library.AgentConfig)]
        if len(seats) != 1:
            raise ValueError(f"the environment has the seats {', '.join(seats)}, expected one ({hint})")
        if taskset.toolsets(taskset.config) or kind.toolsets(taskset.config.task):
            raise ValueError(f"the taskset has tools of its own, expected none ({hint})")
        if kind.NEEDS_CONTAINER or any(map(_needs_runtime, self._hooks(kind))):
            raise ValueError(f"the tasks need a runtime, expected ones that are scored by what was said ({hint})")
        if any(map(self._concerns_requests, self._tasks[:1])):
            raise ValueError(
                f"the tasks have rules about a model's requests, expected rules about what was said ({hint})"
            )

    def _concerns_requests(self, task: Any) -> bool:
        decorated = imported("verifiers.v1.utils.decorators", "verifiers").discover_decorated(task, "intercept")
        boundary = imported("verifiers.v1.session", "verifiers").hook_boundary
        trace = self._library.Trace
        return bool(decorated) or any(boundary(rule, allow_trace=True) is not trace for rule in task.hooks("stop"))

    def _hooks(self, kind: type) -> list[Callable[..., Any]]:
        """What is called before, after and about a conversation, but for the methods of `Task`, which do nothing."""
        own = [getattr(kind, name) for name in ("setup", "finalize")]
        found = [method for method in own if method not in (self._library.Task.setup, self._library.Task.finalize)]
        return found + [hook for task in self._tasks[:1] for name in ("reward", "metric") for hook in task.hooks(name)]


class VerifiersEnvironment:
    """One episode after another. The environment's own code runs as a task of the event loop and waits for the policy where it would for a model."""

    def __init__(self, library: ModuleType, env: Any, tasks: list[Any]) -> None:
        self._library, self._env, self._tasks = library, env, tasks
        self._playing: asyncio.Task[float] | None = None

    async def reset(self, row: Mapping[str, Any]) -> Observation:
        if TASK not in row:
            raise ValueError(f"the row has no column {TASK!r}, expected the rows of `rows()`")
        await self.close()
        self._asked: asyncio.Queue[Observation] = asyncio.Queue()
        self._replies: asyncio.Queue[str | None] = asyncio.Queue()
        self._playing = asyncio.create_task(self._play(self._tasks[row[TASK]]))
        said = await self._asked.get()
        if said is None:
            await self._playing
            raise ValueError("the environment asked nothing, expected at least one turn")
        return said

    async def step(self, completion: str) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        self._replies.put_nowait(completion)
        said = await self._asked.get()
        return said, 0.0, said is None, False, {}

    async def get_reward(self) -> float:
        """The weighted sum of all rewards. Where the policy has no more turns the conversation ends as at verifiers' own limit."""
        self._replies.put_nowait(None)
        return await self._playing

    async def close(self) -> None:
        if self._playing is not None:
            self._playing.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await self._playing

    async def _play(self, task: Any) -> float:
        traces: list[Any] = []
        try:
            agents = self._library.Agents(self._env.config, lambda name, config: _Seat(self, config, name, traces))
            await self._env.setup(agents)
            await self._env.run(task, agents)
            about = {"type": type(task).__name__, "data": task.data, "key": task.key, "hash": task.hash}
            episode = self._library.Episode(
                env=self._library.EnvInfo(id=self._env.config.env_id),
                task=self._library.TraceTask(**about),
                traces=traces,
            )
            await self._env.finalize(task, episode)
            return sum(trace.reward for trace in traces)
        finally:
            self._asked.put_nowait(None)

    # For a seat

    @property
    def library(self) -> ModuleType:
        return self._library

    async def ask(self, messages: list[Message]) -> str | None:
        """What the policy says to them; None where it has no more turns."""
        only = messages[0] if len(messages) == 1 else {}
        self._asked.put_nowait(only["content"] if only.get("role") == "user" else messages)
        return await self._replies.get()


class _Seat:
    """The policy, with what verifiers' `Agent` has."""

    trainable = True

    def __init__(self, policy: VerifiersEnvironment, config: Any, name: str, traces: list[Any]) -> None:
        self._policy, self._config, self._name, self._traces = policy, config, name, traces

    async def run(self, task: Any) -> Any:
        async with self.interaction(task) as talk:
            await talk.turn()
        return talk.trace

    @asynccontextmanager
    async def interaction(self, task: Any) -> AsyncIterator[_Talk]:
        talk = _Talk(self._policy, task, self._config, self._name)
        self._traces.append(talk.trace)
        await _invoke(task.setup, {"trace": talk.trace, "runtime": None})
        yield talk
        await talk.close()


class _Talk:
    """One conversation, with what verifiers' `Interaction` has."""

    def __init__(self, policy: VerifiersEnvironment, task: Any, config: Any, name: str) -> None:
        library = self._library = policy.library
        self._policy, self._task, self._messages = policy, task, []
        about = {"type": type(task).__name__, "data": task.data, "key": task.key, "hash": task.hash}
        self.trace = library.Trace(
            task=library.TraceTask(**about),
            state=imported("verifiers.v1.state", "verifiers").state_cls(type(task))(),
            agent=library.AgentInfo(config=config, name=name),
        )
        self._new = [library.SystemMessage(content=task.data.system_prompt)] if task.data.system_prompt else []
        prompt = task.data.prompt
        self._new += [library.UserMessage(content=prompt)] if isinstance(prompt, str) else prompt or []

    async def turn(self, message: Any = None) -> Any:
        """A `Segment` with what the policy said; a terminated one where it says no more."""
        library = self._library
        if isinstance(message, str):
            message = [library.UserMessage(content=message)]
        parse = imported("verifiers.v1.dialects", "verifiers").parse_message
        self._new += [parse(entry) if isinstance(entry, dict) else entry for entry in message or []]
        reply = None if await self._stopped() else await self._policy.ask([_plain(entry) for entry in self._new])
        if reply is None:
            self.trace.stop("max_turns")
            return library.Segment(messages=[], terminated=True)
        self._messages, self._new = [*self._messages, *self._new], []
        answer = library.AssistantMessage(content=reply)
        graph = imported("verifiers.v1.graph", "verifiers")
        response = library.Response(id="", created=0, model="policy", message=answer, finish_reason="stop")
        graph.prepare_turn(self.trace, self._messages).commit(response)
        self._messages.append(answer)
        return library.Segment(messages=[answer])

    async def close(self) -> Any:
        """Score what was said."""
        self.trace.stop("user_closed")
        await _invoke(self._task.finalize, {"trace": self.trace, "runtime": None})
        await self._task.score(self.trace)
        self.trace.ok = True
        return self.trace

    async def _stopped(self) -> bool:
        """Whether one of the task's own rules ends it."""
        for rule in self._task.hooks("stop"):
            if await _invoke(rule, {self._library.Trace: self.trace}):
                self.trace.stop(rule.__name__)
                return True
        return False


async def _invoke(hook: Callable[..., Any], available: dict[Any, Any]) -> Any:
    """With what its signature asks for, as verifiers does."""
    found = imported("verifiers.v1.utils.decorators", "verifiers").invoke(hook, available)
    return await found if inspect.isawaitable(found) else found


def _needs_runtime(hook: Callable[..., Any]) -> bool:
    parameter = inspect.signature(hook).parameters.get("runtime")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _plain(message: Any) -> Message:
    return message.model_dump(exclude_none=True)
