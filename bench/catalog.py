"""Which ops are measured, and where their cases stand."""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches
from importlib import import_module

from fastppo.bench.harness import Case, Target

# Measured on a CPU alone: its models are sized for one.
CPU_ONLY = ("rollout",)
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


def ops_on(device: str) -> tuple[str, ...]:
    """The ops that are measured on "cpu" or "cuda"."""
    return OPS if device == "cpu" else tuple(op for op in OPS if op not in CPU_ONLY)


def check_op(op: str, device: str = "cpu") -> None:
    """ValueError naming the nearest op when there is none called `op`, or saying that it has no case on `device`."""
    if op not in OPS:
        nearest = get_close_matches(op, OPS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown op {op!r}, did you mean {nearest!r}? The ops are {', '.join(OPS)}")
    if op not in ops_on(device):
        raise ValueError(f"{op} has no case on {device}, expected one of {', '.join(ops_on(device))}")


def load_cases(op: str, quick: bool, device: str = "cpu") -> list[Case]:
    """The cases of `op` at the sizes of a device type, in one order whatever `quick` is; quick ones are small and have no target."""
    module = import_module(f"fastppo.bench.{op}")
    cases = module.cases(quick) if op in CPU_ONLY else module.cases(quick, device)
    return [replace(case, target=Target()) for case in cases] if quick else cases
