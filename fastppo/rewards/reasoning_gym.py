"""Tasks of reasoning-gym (arXiv:2505.24760): problems without end, each with its verifier."""

from __future__ import annotations

import difflib
import functools
import json
import math
from collections.abc import Mapping
from typing import Any

from fastppo.rewards.text import text_of

PREFIX = "reasoning_gym:"


def reasoning_gym(
    completions: list, question: list, answer: list, metadata: list, task: list, task_arguments: list, **columns: Any
) -> list[float]:
    """The score in [0, 1] that the task's own verifier gives the completion's answer. The columns are those that the data
    `reasoning_gym:TASK` have.

    The answer is what the last `<answer>` tags hold; without them, what follows `</think>`, or the whole text. NaN (invalid) where the verifier
    raises. Some verifiers evaluate what the model writes as Python.

    Raises ImportError where reasoning-gym is missing, ValueError as `task_rows`.
    """
    _library()
    rows = zip(question, answer, metadata, strict=True)
    entries = [{"question": text, "answer": gold, "metadata": facts} for text, gold, facts in rows]
    verifiers = [_task(name, _key(arguments)) for name, arguments in zip(task, task_arguments, strict=True)]
    answers = [answer_in(text_of(completion)) for completion in completions]
    return [_score(*parts) for parts in zip(verifiers, answers, entries, strict=True)]


def task_rows(name: str, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`size` (500) problems of a task with `seed` (0), each different: those that come a second time are left out.

    Columns: `prompt` and `question`, the same text; `answer`, `metadata`, as the task has them; `task` and `task_arguments`, for the verifier.

    Raises ImportError where reasoning-gym is missing, ValueError for a task that it does not have, with the nearest, or arguments that the task
    does not take.
    """
    arguments = {"size": 500, "seed": 0, **arguments}
    task = _task(name, _key(arguments))
    rows: dict[str, dict[str, Any]] = {}
    for entry in (task[index] for index in range(len(task))):
        columns = {column: entry[column] for column in ("question", "answer", "metadata")}
        own = {"prompt": entry["question"], "task": name, "task_arguments": arguments}
        rows.setdefault(entry["question"], columns | own)
    return list(rows.values())


def answer_in(text: str) -> str:
    """What the last `<answer>` tags hold; without them, what follows the last `</think>`, or the whole text."""
    before, opened, rest = text.rpartition("<answer>")
    return (rest.partition("</answer>")[0] if opened else text.rpartition("</think>")[2]).strip()


def _score(verifier: Any, answer: str, entry: dict[str, Any]) -> float:
    try:
        return float(verifier.score_answer(answer, entry))
    except Exception:  # one odd answer must not cost the scores of the whole batch
        return math.nan


def _key(arguments: Mapping[str, Any]) -> str:
    try:
        return json.dumps(arguments, sort_keys=True)
    except TypeError as error:
        raise ValueError(f"task_arguments is {arguments!r}, expected what JSON can hold: {error}") from error


@functools.lru_cache(maxsize=64)
def _task(name: str, arguments: str) -> Any:
    """The task's data set, whose `score_answer` is the verifier: of the same arguments as the problems, because some verifiers look at them."""
    factory = _library()
    if name not in factory.DATASETS:
        near = difflib.get_close_matches(name, factory.DATASETS, n=1, cutoff=0.0)[0]
        raise ValueError(f"reasoning-gym has no task {name!r}; the nearest is {near}")
    given = json.loads(arguments)
    try:
        return factory.create_dataset(name, **given)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"task_arguments is {given!r}, which {PREFIX}{name} does not take: {error}") from error


def _library() -> Any:
    try:
        from reasoning_gym import factory
    except ImportError as error:
        raise ImportError("reasoning_gym tasks need reasoning-gym: pip install fastppo[reasoning-gym]") from error
    return factory
