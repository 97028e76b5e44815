"""Processes that have imported what a test needs and run nothing: each is forked from a server that has done no more."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

context = multiprocessing.get_context("forkserver")
"""The one server of this process."""

IMPORTED = [
    "torch",
    "torch.distributed",
    "transformers",
    "fastppo",
    "tests.tiny_trainer",
    "torch._dynamo",
    "fastppo.bench.step_memory",
    "peft",
]
"""By the server, as it starts. `torch._dynamo` is what FSDP's hooks import when they are first called; what is not installed is left out."""

context.set_forkserver_preload(IMPORTED)


def in_a_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function(*arguments)` returns or raises there.

    A forked copy of this process would have its heap, whose free pages, after hundreds of tests, take in what is measured and keep what it frees.
    """
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()
