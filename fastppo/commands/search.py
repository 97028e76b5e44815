"""`fastppo generate --search`: one answer to each prompt, and what was spent on it."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from typing import Any

from fastppo.console import printable
from fastppo.model.decoding import decode
from fastppo.rollout import Engine, SamplingParams
from fastppo.rollout.prompts import encode_prompts
from fastppo.search import (
    Found,
    TreeParams,
    best_of_n,
    critic_values,
    last_match,
    load_critic,
    majority_vote,
    puct,
    value_guided,
    value_score,
)

TREE = {"width": "width", "step": "step_strings", "step_tokens": "step_tokens", "simulations": "simulations"}
TREE |= {"c_puct": "c_puct", "budget": "budget"}
TAKEN = {
    "majority": {"answer"},
    "best-of-n": {"critic"},
    "value-guided": {"critic", "width", "budget"},
    "puct": {"critic", *TREE},
}


def given(options: argparse.Namespace) -> list[str]:
    """Which of the options for searches were given, as they are typed."""
    names = sorted(set().union(*TAKEN.values()))
    return [_typed(name) for name in names if getattr(options, name) is not None]


def run(options: argparse.Namespace, engine: Engine, prompts: list[Any], sampling: SamplingParams) -> int:
    """Print an answer to each prompt on standard output, scores and tokens on standard error."""
    kind, found = options.search, _SEARCHES[options.search](options, engine, prompts, sampling)
    for index, answer in enumerate(found):
        if len(found) > 1:
            print(f"--- prompt {index}")
        print(printable(decode(engine.tokenizer, answer.completion, skip_special_tokens=True)))
        print(f"{kind}: score {answer.score:.3g}, {answer.new_tokens} tokens", file=sys.stderr)
    return 0


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for an option that the search does not take, one that it lacks, and a pattern or a tree's number that is none: before a
    model is loaded."""
    kind = options.search
    if kind is None:
        if names := given(options):
            raise ValueError(f"{names[0]} is given without --search, expected --search {', '.join(TAKEN)}")
        return
    taken = TAKEN[kind]
    if others := [name for name in given(options) if name not in map(_typed, taken)]:
        raise ValueError(f"--search {kind} does not take {others[0]}, expected {', '.join(map(_typed, sorted(taken)))}")
    needed = "answer" if kind == "majority" else "critic"
    if getattr(options, needed) is None:
        raise ValueError(f"--search {kind} needs {_typed(needed)}")
    if kind in ("majority", "best-of-n") and options.n < 2:
        raise ValueError(f"-n is {options.n}, expected 2 or more answers for --search {kind}")
    if kind == "majority":
        _answer(options)
    if kind == "puct":
        _tree_params(options)


def _typed(name: str) -> str:
    return "--" + name.replace("_", "-")


def _answer(options: argparse.Namespace) -> Callable[[str], Any]:
    """What an answer says."""
    try:
        return last_match(options.answer)
    except re.error as error:
        raise ValueError(f"--answer is {options.answer!r}, expected a regular expression: {error}") from error


def _tree_params(options: argparse.Namespace) -> TreeParams:
    settings = {name: getattr(options, option) for option, name in TREE.items() if getattr(options, option) is not None}
    return TreeParams(**settings)


def _majority(options: argparse.Namespace, engine: Engine, prompts: list[Any], sampling: SamplingParams) -> list[Found]:
    return majority_vote(engine, prompts, sampling, _answer(options))


def _best(options: argparse.Namespace, engine: Engine, prompts: list[Any], sampling: SamplingParams) -> list[Found]:
    tokens = encode_prompts(prompts, engine.model, engine.tokenizer)
    values = critic_values(load_critic(options.critic, engine.model))
    return best_of_n(engine, tokens, sampling, value_score(values, tokens))


def _guided(options: argparse.Namespace, engine: Engine, prompts: list[Any], sampling: SamplingParams) -> list[Found]:
    values = critic_values(load_critic(options.critic, engine.model))
    settings = {name: getattr(options, name) for name in ("width", "budget") if getattr(options, name) is not None}
    return value_guided(engine, prompts, sampling, values, **settings)


def _tree(options: argparse.Namespace, engine: Engine, prompts: list[Any], sampling: SamplingParams) -> list[Found]:
    values = critic_values(load_critic(options.critic, engine.model))
    return puct(engine, prompts, sampling, values, _tree_params(options))


_SEARCHES: dict[str, Callable[..., list[Found]]] = {
    "majority": _majority,
    "best-of-n": _best,
    "value-guided": _guided,
    "puct": _tree,
}
