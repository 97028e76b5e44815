"""How a command that trains ends: what it prints when it is done, and where a signal ends it, how to go on."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path


def complete(
    act: Callable[[], str | None], command: Sequence[str], newest_checkpoint: Callable[[], Path | None], *, first: bool
) -> int:
    """Do `act`, print what it returns, and return the exit code; where a signal ends it, say how to go on.

    command: the words that go on where they stand before `--resume`. first: whether this process is the one that speaks, of several.
    """
    try:
        text = act()
    except (KeyboardInterrupt, SystemExit) as end:
        with suppress(OSError):  # a terminal that is gone
            if first:
                print(f"fastppo: interrupted; {_how_to_go_on(command, newest_checkpoint())}", file=sys.stderr)
        settle_stdout()
        return end.code if isinstance(end, SystemExit) else 130
    if text is not None:
        settle_stdout(text)
    return 0


def _how_to_go_on(command: Sequence[str], newest: Path | None) -> str:
    if newest is None:
        return "no step is done, so there is no checkpoint yet"
    return f"the last checkpoint is {newest}; go on with: {shlex.join([*command, '--resume'])}"


def settle_stdout(text: str = "") -> None:
    """Print what a run ends with, or what is left of it: the run is over, whether or not anybody reads this."""
    from fastppo.console import printable  # not where the command line only needs a help text

    try:
        print(printable(text), end="\n" if text else "", flush=True)
    except OSError:
        silence_stdout()


def silence_stdout() -> None:
    """What is still in its buffer is lost; the exit of Python would complain of it."""
    with suppress(Exception):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
