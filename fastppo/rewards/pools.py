"""Pools that were made before the fork: their threads are not in the copy, which would wait for them for ever. There they start anew."""

from __future__ import annotations

import contextlib
import functools
import gc
import queue
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def pools_of_this_process() -> list[Any]:
    """Every executor and multiprocessing pool. Looks through all objects (a tenth of a second), where there may be one."""
    kinds = _kinds()
    if list(kinds) == [ThreadPoolExecutor] and threading.active_count() == 1:  # without threads it needs nothing
        return []
    wanted = {id(cls) for kind in kinds for cls in _with_subclasses(kind)}
    return [thing for thing in gc.get_objects() if id(type(thing)) in wanted]


def restart_at_first_use(pools: list[Any]) -> None:
    """In a fork: make the copies usable. What they were busy with stays with the originals, and so does the server that forks for them."""
    with contextlib.suppress(Exception):
        _forget_fork_server()
    for pool in pools:
        restart = next(restart for kind, restart in _kinds().items() if isinstance(pool, kind))
        with contextlib.suppress(Exception):  # a subclass that is made otherwise: it stays as it is
            restart(pool)


def _forget_fork_server() -> None:
    if module := sys.modules.get("multiprocessing.forkserver"):
        preload = module._forkserver._preload_modules
        module._forkserver.__init__()
        module._forkserver._preload_modules = preload


def _kinds() -> dict[type, Callable[[Any], None]]:
    """The standard library's pools, as far as their modules are loaded, and how each is restarted."""
    kinds: dict[type, Callable[[Any], None]] = {ThreadPoolExecutor: _empty}
    if module := sys.modules.get("concurrent.futures.process"):
        kinds[module.ProcessPoolExecutor] = functools.partial(_restart_executor, module.ProcessPoolExecutor)
    if module := sys.modules.get("multiprocessing.pool"):
        kinds[module.ThreadPool] = functools.partial(_restart_pool, module.ThreadPool)
        kinds[module.Pool] = functools.partial(_restart_pool, module.Pool)
    return kinds


def _with_subclasses(cls: type) -> list[type]:
    return [cls, *(inner for sub in cls.__subclasses__() for inner in _with_subclasses(sub))]


def _empty(executor: Any) -> None:
    """A thread executor without threads starts them as they are needed."""
    executor._threads, executor._idle_semaphore = set(), threading.Semaphore(0)
    executor._work_queue, executor._shutdown_lock = queue.SimpleQueue(), threading.Lock()


def _restart_executor(kind: type, executor: Any) -> None:
    if executor._shutdown_thread:
        return
    names = {"mp_context": "_mp_context", "initializer": "_initializer", "initargs": "_initargs"}
    names |= {"max_tasks_per_child": "_max_tasks_per_child"} if hasattr(executor, "_max_tasks_per_child") else {}
    keywords = {keyword: getattr(executor, attribute) for keyword, attribute in names.items()}
    _when_called(executor, "submit", functools.partial(kind.__init__, executor, executor._max_workers, **keywords))


def _restart_pool(kind: type, pool: Any) -> None:
    if pool._state != "RUN":
        return
    arguments = [pool._processes, pool._initializer, pool._initargs]
    if kind.__name__ == "Pool":
        arguments += [pool._maxtasksperchild, pool._ctx]
    again = functools.partial(kind.__init__, pool, *arguments)
    _when_called(pool, "_check_running", again)  # with which every call begins


def _when_called(pool: Any, method: str, restart: Callable[[], None]) -> None:
    """Restart the pool at the first call of `method`: not in the keeper, and not in a process that never uses it."""

    def first(*arguments: Any, **keywords: Any) -> Any:
        del pool.__dict__[method]
        restart()
        return getattr(pool, method)(*arguments, **keywords)

    pool.__dict__[method] = first
