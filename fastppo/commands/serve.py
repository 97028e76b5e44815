"""`fastppo serve`: a model as a server that speaks OpenAI's chat completions."""

from __future__ import annotations

import argparse
import hmac
import ipaddress
import os
import shlex
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from fastppo.console import printable
from fastppo.data.chat import ChatTemplate
from fastppo.envs import Dialogue
from fastppo.model import context_length, load_model, load_tokenizer, resolve_device
from fastppo.recipe import load_recipe
from fastppo.rollout import Engine, SamplingParams
from fastppo.run_folder import CONFIG, MODEL
from fastppo.serve import ChatServer, ChatService

KEY = "FASTPPO_API_KEY"


class Policy(NamedTuple):
    """What is served, and how."""

    model: str
    tokenizer: str
    dtype: str
    device: str
    batch_size: int
    sampling: SamplingParams | None
    """Of the recipe; None where there is none."""


def run(options: argparse.Namespace) -> int:
    key = os.environ.get(KEY, "")
    _check_host(options.host, key)
    if not 0 <= options.port < 2**16:
        raise ValueError(f"--port is {options.port}, expected 0 to {2**16 - 1}")
    policy = policy_of(options.model, options.overrides)
    called = "model" if policy.tokenizer == policy.model else "model.tokenizer"
    tokenizer = load_tokenizer(policy.tokenizer, called)
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {policy.tokenizer} has no chat template, expected one: it is served messages"
        )
    inbox: SimpleQueue[Any] = SimpleQueue()
    server = ChatServer(policy.model, inbox, _admission(key))
    model = load_model(policy.model, dtype=policy.dtype, device=resolve_device(policy.device))
    context = context_length(model)
    if context is None:
        raise ValueError(f"the context of {policy.model} has no limit, expected one that has")
    engine = Engine(model, tokenizer, max_batch_size=policy.batch_size, keep_cache=True)
    usual = policy.sampling or SamplingParams(max_new_tokens=context - 1)
    service = ChatService(engine, Dialogue(tokenizer, ChatTemplate(tokenizer, None)), policy.model, usual, inbox)
    with _ending_by_sigterm():
        try:
            base_url = server.open(options.host, options.port)
            print(f"{printable(policy.model)} is served at {base_url} (Ctrl-C ends it)", flush=True)
            service.run()
        finally:
            server.close()
    return 0


def _check_host(host: str, key: str) -> None:
    """Raises ValueError for an address that other machines reach, where everybody could ask, and for one that is none."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host is {host!r}, expected a name or an address of this machine: {error}") from error
    if not key and not all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found):
        raise ValueError(
            f"--host is {host}, which other machines can reach: set {KEY}, the key that requests then have to bring"
        )


def _admission(key: str) -> Callable[[str], str | None]:
    """Every request, or those that bring the key."""
    return lambda given: given if not key or hmac.compare_digest(given.encode(), key.encode()) else None


def policy_of(name: str, overrides: list[str]) -> Policy:
    """Raises ValueError for a run folder that has no model yet, and for overrides of what is no recipe."""
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml"):
        recipe = load_recipe(path, overrides)
        trained = Path(recipe.output_dir) / MODEL
        model = str(trained) if (trained / "config.json").exists() else recipe.model.name
        if not model:
            raise ValueError("model.name is empty; the recipe has to set it")
        tokenizer = model if trained.exists() else recipe.model.tokenizer or model
        sampling = recipe.rollout.sampling(recipe.seed)
        return Policy(model, tokenizer, recipe.model.dtype, recipe.device, recipe.rollout.batch_size, sampling)
    if overrides:
        raise ValueError(f"{overrides[0]} is given with {name}, expected overrides with a recipe only")
    if (path / CONFIG).exists():
        if not (path / MODEL / "config.json").exists():
            raise ValueError(
                f"{name} is a run that has not written its model yet: {shlex.join(['fastppo', 'export', name])}"
            )
        path = path / MODEL
    model = str(path) if path.exists() else name
    return Policy(model, model, "auto", "auto", 64, None)


@contextmanager
def _ending_by_sigterm() -> Iterator[None]:
    """SIGTERM leaves the block as Ctrl-C does, with its own exit code."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
