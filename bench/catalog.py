"""Which ops are measured, and where their cases stand."""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches
from importlib import import_module

from fastppo.bench.harness import Case, Target

OPS = (
    "token_logprobs",
    "linear_token_logprobs",
    "linear_ppo_loss",
    "gae",
    "masked_whiten",
    "approx_kl",
    "ppo_loss",
    "sample_tokens",
    "decode_attention",
    "batch_invariant_linear",
    "rollout",
)


def check_op(op: str) -> None:
    """ValueError naming the nearest op when there is none called `op`."""
    if op not in OPS:
        nearest = get_close_matches(op, OPS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown op {op!r}, did you mean {nearest!r}? The ops are {', '.join(OPS)}")


def load_cases(op: str, quick: bool) -> list[Case]:
    """The cases of `op`, in one order whatever `quick` is; quick ones are small and have no target."""
    cases = import_module(f"fastppo.bench.{op}").cases(quick)
    return [replace(case, target=Target()) for case in cases] if quick else cases
