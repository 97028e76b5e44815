"""Settings of a run that several processes make."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from fastppo.setting_types import STRICT, Positive


@dataclass(config=STRICT)
class DistributedConfig:
    """Several processes, started by `torchrun`. docs/distributed.md."""

    timeout: Positive = 1800.0
    """Most seconds that ranks wait for the slowest of them before the run ends and names it: more than one rank may need longer than another to
    sample or to score its share of a step."""
    sharding: Literal["none", "full"] = "none"
    """`none`: every rank has all weights. `full`: each has a part of policy, critic, reference and optimizer, and gathers a layer while it runs
    (FSDP2)."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """The type in which the gradients of sharded half-precision weights are summed over the ranks."""
    cpu_offload: bool = False
    """Keep the parts of sharded weights and their optimizer's state in the host's memory."""

    @model_validator(mode="after")
    def _check_sharding(self) -> DistributedConfig:
        for name, off in {"reduce_dtype": "float32", "cpu_offload": False}.items():
            if self.sharding == "none" and getattr(self, name) != off:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {off} with sharding none")
        return self
