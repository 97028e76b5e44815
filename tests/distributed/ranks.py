"""Several ranks in processes of their own, which are forked from one that has imported what they need."""

from __future__ import annotations

import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tests.fresh import context

SECONDS = 300  # that a function may take; the machine may be busy


class RankFailed(AssertionError):
    """A rank has raised; `texts` has what, for each rank ("" where it has not)."""

    def __init__(self, texts: list[str]) -> None:
        super().__init__("\n".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text))
        self.texts = texts


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any, environment: dict | None = None) -> list[Any]:
    """What `function(*arguments)` returned in each of `size` ranks. Raises RankFailed where one raised.

    environment: variables besides those that torchrun sets.
    """
    pipes, processes, port = [], [], _free_port()
    for rank in range(size):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
        variables |= {"MASTER_PORT": port, "OMP_NUM_THREADS": 1} | (environment or {})
        ours, theirs = context.Pipe()
        process = context.Process(target=_life, args=(theirs, variables, function, arguments))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    answers = [_answer(pipe) for pipe in pipes]
    for process in processes:
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()
    texts = [text for _, text in answers]
    if any(texts):
        raise RankFailed(texts)
    return [value for value, _ in answers]


def _answer(pipe: Connection) -> tuple[Any, str]:
    try:
        return pickle.loads(pipe.recv_bytes()) if pipe.poll(SECONDS) else (None, f"no answer within {SECONDS} s")
    except EOFError:
        return None, "the process has ended"


def _life(pipe: Connection, variables: dict[str, Any], function: Callable[..., Any], arguments: tuple) -> None:
    import torch

    from fastppo import run_loop

    torch.set_num_threads(1)
    run_loop.plot_run = lambda path: None  # curve.png takes longer than most runs here
    os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        answer = function(*arguments), ""
    except BaseException:
        answer = None, traceback.format_exc()
    pipe.send_bytes(pickle.dumps(answer))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
