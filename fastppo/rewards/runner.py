"""Calls reward functions so that none of them can stop, hang or silently falsify a run."""

from __future__ import annotations

import functools
import itertools
import math
import pickle
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fastppo.rewards import process
from fastppo.rewards.function import OWN_ARGUMENTS, BadScores, RewardFunction, Scores, describe, to_scores, unbound
from fastppo.rewards.keeper import ProcessFailure
from fastppo.rewards.process import KillableProcess
from fastppo.rewards.result import RewardAnswers, RewardResult, combine
from fastppo.rewards.weighted import WeightedReward

Conversation = list[dict[str, Any]]
Reward = Callable[..., Any] | WeightedReward


class RewardRunner:
    """Runs reward functions for a batch of completions, each in a process of its own that can be killed.

    A function follows TRL's convention, `fn(prompts, completions, **columns) -> list[float | None]`, sync or async. It is called with
    keywords, those that its signature names or all of them where it has **kwargs: `prompts`, `completions`, `completion_ids` and the
    data's columns, each a list with one entry for each completion. Where a prompt is a conversation (a list of messages), its
    completion is one too: `[{"role": "assistant", "content": text}]`. None means that the function does not apply to a completion.

    The processes are forked when the runner is made, or at the next call after `close`: make it before loading models, so that they
    share no memory with them. They cannot use a GPU that this process uses. All functions work at the same time. A callable whose attribute
    `in_process` is true (`RewardModel`) is called in this process, whatever the timeout.

    Args:
        functions: one function or several; their scores are added. `WeightedReward` gives one a weight, or normalises it.
        timeout: seconds one call may take before the function's process group is killed. None calls the functions in this process
            one after another, where nothing can stop them.
        retries: further attempts after a function raised, was killed, or returned something other than one number or None for each
            completion. After the last one its scores of this batch are invalid.

    Raises:
        TypeError, ValueError: an argument is not as above; a function has no readable signature.
    """

    def __init__(self, functions: Reward | Sequence[Reward], *, timeout: float | None, retries: int = 1) -> None:
        _check_timeout(timeout)
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise ValueError(f"retries is {retries!r}, expected an integer >= 0")
        self._terms = _named_terms(functions)
        self._functions = [RewardFunction(term.function, name) for name, term in self._terms.items()]
        self._attempts = retries + 1
        if timeout is not None and not process.supported():
            _say_no_fork()
            timeout = None
        self._lock = threading.Lock()
        self._callers = {
            f.name: _InProcess(f) if timeout is None or f.in_process else _Forked(f, timeout) for f in self._functions
        }

    def __call__(
        self,
        prompts: Sequence[str | Conversation],
        completions: Sequence[str | Conversation],
        columns: Mapping[str, Sequence[Any]],
        completion_ids: Sequence[Sequence[int]] | None = None,
        normalise: bool = True,
    ) -> RewardResult:
        """Scores of B completions.

        Args:
            prompts: [B] texts or conversations. completions: [B] texts, or messages that follow upon a conversation. columns: name -> [B] values.
            completion_ids: [B] token ids, for functions that ask for them.
            normalise: False leaves out the normalisation that a `WeightedReward` asks for, which makes scores of different batches
                comparable (an evaluation's).

        Raises:
            ValueError, TypeError: lengths or types that do not fit; a function asks for a column that is not there. A function that
                fails raises nothing: its scores are invalid.
        """
        return self.result(self.answers(prompts, completions, columns, completion_ids), normalise)

    def answers(
        self,
        prompts: Sequence[str | Conversation],
        completions: Sequence[str | Conversation],
        columns: Mapping[str, Sequence[Any]],
        completion_ids: Sequence[Sequence[int]] | None = None,
    ) -> RewardAnswers:
        """What the functions say of completions that may be a share of a batch; `result` makes scores of it. Arguments and errors as of a call."""
        arguments = _arguments(prompts, completions, columns, completion_ids)
        requests = {f.name: f.select(arguments) for f in self._functions}
        if not completions:
            return RewardAnswers({name: [] for name in requests}, [], 0)
        with self._lock:
            return RewardAnswers(*self._run(requests, len(completions)), len(completions))

    def result(self, answers: RewardAnswers, normalise: bool = True) -> RewardResult:
        """The scores of a whole batch."""
        return combine(answers, self._terms, normalise)

    @property
    def normalises(self) -> bool:
        """Whether a score depends on the others of its batch."""
        return any(term.normalise for term in self._terms.values())

    def check_columns(self, names: Iterable[str]) -> None:
        """Raises ValueError naming the first argument that a function asks for and data with these columns will not have."""
        arguments = dict.fromkeys([*OWN_ARGUMENTS, *names])
        for function in self._functions:
            function.select(arguments)

    def close(self) -> None:
        """End all processes. The next call would start them again."""
        with self._lock:
            for caller in self._callers.values():
                caller.close()

    def __enter__(self) -> RewardRunner:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self, requests: dict[str, dict[str, Any]], expected: int) -> tuple[dict[str, Scores | None], list[str]]:
        """Each function's scores, None where all attempts failed, and the text of every failed attempt."""
        answers: dict[str, Scores | None] = dict.fromkeys(requests)
        errors: list[str] = []
        for attempt in range(1, self._attempts + 1):
            open_requests = {name: request for name, request in requests.items() if answers[name] is None}
            for name, answer in self._attempt(open_requests, expected).items():
                if "error" in answer:
                    errors.append(f"reward {name!r} failed (attempt {attempt} of {self._attempts}): {answer['error']}")
                else:
                    answers[name] = answer["scores"]
        return answers, errors

    def _attempt(self, requests: dict[str, dict[str, Any]], expected: int) -> dict[str, dict[str, Any]]:
        try:
            for name, request in requests.items():
                self._callers[name].send(request, expected)
            return {name: self._callers[name].receive(expected) for name in requests}
        except BaseException:  # Ctrl-C above all: leave no answer behind that the next call would take for its own
            for name in requests:
                self._callers[name].cancel()
            raise


class _InProcess:
    """Calls the function here."""

    def __init__(self, function: RewardFunction) -> None:
        self._function = function
        self._request: dict[str, Any] = {}

    def send(self, request: dict[str, Any], expected: int) -> None:
        self._request = request

    def receive(self, expected: int) -> dict[str, Any]:
        return self._function.answer(self._request, expected)

    def cancel(self) -> None:
        self._request = {}

    def close(self) -> None:
        self._request = {}


class _Forked:
    """Calls the function in a killable process; what comes back is checked again on this side."""

    def __init__(self, function: RewardFunction, timeout: float) -> None:
        self._name = function.name
        self._process = KillableProcess(functools.partial(_serve, function), timeout)
        self.cancel, self.close = self._process.cancel, self._process.close

    def send(self, request: dict[str, Any], expected: int) -> None:
        try:
            data = pickle.dumps((request, expected))
        except Exception as error:
            raise TypeError(
                f"the columns hold something that cannot be sent to the process of reward {self._name!r} ({error}): "
                "leave it out, or call the rewards in this process with timeout=None"
            ) from error
        self._process.send(data)

    def receive(self, expected: int) -> dict[str, Any]:
        try:
            answer = self._process.receive()
            return (
                {"error": str(answer["error"])}
                if "error" in answer
                else {"scores": to_scores(answer.get("scores"), expected)}
            )
        except (ProcessFailure, BadScores) as error:
            return {"error": str(error)}


def _serve(function: RewardFunction, request: bytes) -> dict[str, Any]:
    keywords, expected = pickle.loads(request)  # written by the process that forked this one
    try:
        return function.answer(keywords, expected)
    except KeyboardInterrupt as error:  # its own: Ctrl-C is the trainer's to handle
        return {"error": describe(error)}


@functools.cache
def _say_no_fork() -> None:
    warnings.warn(
        "this platform cannot fork: rewards run in the trainer's process and have no time limit", stacklevel=4
    )


def _check_timeout(timeout: float | None) -> None:
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
        raise ValueError(f"timeout is {timeout!r}, expected a finite number of seconds > 0, or None")


def _named_terms(functions: Reward | Sequence[Reward]) -> dict[str, WeightedReward]:
    """Under the functions' own names; the second `f` is `f_2`."""
    several = [functions] if callable(functions) or isinstance(functions, WeightedReward) else functions
    if not isinstance(several, list | tuple):
        hint = f" (a reward model is RewardModel({functions!r}): docs/rewards.md)" if isinstance(functions, str) else ""
        raise TypeError(f"functions is {type(functions).__name__}, expected a callable or a list of callables{hint}")
    if not several:
        raise ValueError("functions is empty, expected at least one reward function")
    terms: dict[str, WeightedReward] = {}
    for reward in several:
        term = reward if isinstance(reward, WeightedReward) else WeightedReward(reward)
        inner = unbound(term.function)
        plain = getattr(inner, "__name__", type(inner).__name__)
        names = itertools.chain([plain], (f"{plain}_{count}" for count in itertools.count(2)))
        terms[next(name for name in names if name not in terms)] = term
    return terms


def _arguments(
    prompts: Sequence[str | Conversation],
    completions: Sequence[str | Conversation],
    columns: Mapping[str, Sequence[Any]],
    completion_ids: Sequence[Sequence[int]] | None,
) -> dict[str, Any]:
    """Everything a function may ask for, by keyword."""
    for name in OWN_ARGUMENTS:
        if name in columns:
            raise ValueError(
                f"columns has {name!r}, which is the name of a reward function's own argument: rename the column"
            )
    for index, (prompt, text) in enumerate(zip(prompts, completions, strict=False)):
        if not isinstance(text, str) and not (isinstance(text, list) and isinstance(prompt, list)):
            raise TypeError(f"completions[{index}] is {type(text).__name__}, expected str")
    arguments: dict[str, Any] = {"prompts": list(prompts), "completions": list(completions)}
    if completion_ids is not None:
        arguments["completion_ids"] = [list(ids) for ids in completion_ids]
    arguments |= {name: list(values) for name, values in columns.items()}
    for name, values in arguments.items():
        if len(values) != len(completions):
            raise ValueError(f"{name} has {len(values)} entries, expected {len(completions)}, one for each completion")
    arguments["completions"] = [_as_in_prompt(p, text) for p, text in zip(prompts, completions, strict=True)]
    return arguments


def _as_in_prompt(prompt: str | Conversation, text: str | Conversation) -> str | Conversation:
    if isinstance(prompt, str) or isinstance(text, list):
        return text
    if isinstance(prompt, list):
        return [{"role": "assistant", "content": text}]
    raise TypeError(f"a prompt is {type(prompt).__name__}, expected str or a list of messages")
