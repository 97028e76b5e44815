"""Which errors are the user's: a sentence is enough for those, every other one needs its traceback."""

from __future__ import annotations

import dis
from types import TracebackType


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or cannot be read; the message names the path and what to do."""


class TrainingError(RuntimeError):
    """The run cannot go on, or its model could not be written; the message says why, and where the weights are."""


# What these are called with is of our own making: their checks find our mistakes, not the user's.
_OURS = (
    "ops",
    "native",
    "reference",
    "kernels",
    "model.packed",
    "model.attention",
    "rollout.rollout",
    "rollout.record",
)
_SHARED_CHECKS = "fastppo.ops._checks"  # speak for whoever called them
_USERS_OWN = "fastppo.ops._backends"  # FASTPPO_BACKEND


def is_users(error: BaseException) -> bool:
    """Whether its message tells users what to mend: a run that cannot go on, a file or folder that the system refuses, or an argument
    that one of our own checks refuses with a `raise`. A ValueError that came up anywhere else is a fault of the program."""
    if isinstance(error, CheckpointError | TrainingError | OSError):
        return True
    return isinstance(error, ValueError | TypeError | ImportError) and _raised_by_a_check(error.__traceback__)


def _raised_by_a_check(traceback: TracebackType | None) -> bool:
    module, raised = "", False
    while traceback is not None:
        spec = traceback.tb_frame.f_globals.get("__spec__")  # under `python -m`, `__name__` says nothing
        name = "" if spec is None else spec.name
        raised = dis.opname[traceback.tb_frame.f_code.co_code[traceback.tb_lasti]] == "RAISE_VARARGS"
        module = module if name == _SHARED_CHECKS else name
        traceback = traceback.tb_next
    ours = any(module == f"fastppo.{part}" or module.startswith(f"fastppo.{part}.") for part in _OURS)
    return raised and module.startswith("fastppo.") and (module == _USERS_OWN or not ours)
