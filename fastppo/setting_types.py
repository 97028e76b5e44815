"""What the values of settings may be: the types that the dataclasses of settings are written in."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
OptionalCount = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""Every generator of random numbers in a run takes it."""
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _path_text(value: Any) -> Any:
    """A `Path` as its text, `~` as the user's home."""
    return os.path.expanduser(value) if isinstance(value, str | os.PathLike) else value


def one_or_more(value: Any) -> Any:
    """A text as a list of one, so that `tracking.to=wandb` is one."""
    return (value,) if isinstance(value, str) else value


PathText = Annotated[str, BeforeValidator(_path_text)]

SET_NAME = r"[\w.-]+"
SetName = Annotated[str, Field(pattern=f"^{SET_NAME}$")]
"""Of a set of held-out prompts: it stands in the names of metrics."""

STRICT = ConfigDict(extra="forbid")
