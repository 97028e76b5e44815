"""Which ops are measured, and where their cases stand."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from types import ModuleType

from fastppo.bench.harness import Case
from fastppo.bench.setting import Setting

# Measured on a CPU alone: their models and sizes are for one.
CPU_ONLY = ("ppo_update", "drop_in")
# Whose cases on a GPU stand in a file of their own.
ON_GPU = {"ppo_step": "ppo_step_gpu", "rollout": "rollout_gpu"}
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
    "packed_attention",
    "batch_invariant_linear",
    "rms_norm",
    "rotary_embedding",
    "swiglu",
    "rollout",
    "ppo_step",
    "ppo_update",
    "drop_in",
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


def case_file(op: str) -> ModuleType:
    """The module with the cases of `op`. Besides `cases` it may have SIZES, the names of the numbers of a size; USUAL, that size of a quick
    run and of each device; SCALED, the numbers to scale over and the longest, in usual sizes or in those of SCALED_FROM; TYPED, whether it
    comes in several types."""
    return import_module(f"fastppo.bench.{op}")


def size_names(op: str) -> tuple[str, ...]:
    return getattr(case_file(op), "SIZES", ())


def takes_dtype(op: str) -> bool:
    return getattr(case_file(op), "TYPED", False)


def load_cases(op: str, setting: Setting) -> list[Case]:
    """The cases of `op`; a quick setting gives small ones in the same order."""
    return case_file(ON_GPU.get(op, op) if setting.on_gpu else op).cases(setting)
