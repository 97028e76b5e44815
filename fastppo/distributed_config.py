"""Settings of a run that several processes make."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from fastppo.setting_types import STRICT, Positive


@dataclass(config=STRICT)
class DistributedConfig:
    """Several processes, started by `torchrun`. docs/distributed.md."""

    timeout: Positive = 1800.0
    """Most seconds that ranks wait for the slowest of them before the run ends and names it: more than one rank may need longer than another to
    sample or to score its share of a step."""
