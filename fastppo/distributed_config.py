"""Settings of a run that several processes make."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from fastppo.setting_types import STRICT, Positive

UNDIVIDED = {
    "optimizer.name": ("adamw", "moments of 8 bits are not divided"),
    "optimizer.bf16_stochastic_round": (False, "each rank's part of what learns is kept in fp32"),
    "optimizer.offload": (False, "distributed.cpu_offload moves all"),
    "learner.offload_reference": (False, "distributed.cpu_offload moves all"),
    "lora.quantization": (
        None,
        "weights of 4 bits are not divided, and with distributed.sharding none each rank has them",
    ),
}
"""Settings of a run -> what they have to be with sharding full, and why."""


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

    def require_divisible(self, config: Any) -> None:
        """Raises ValueError for a setting of a run's `config` that sharding does not go with."""
        for name, (expected, why) in UNDIVIDED.items() if self.sharding == "full" else ():
            section, setting = name.split(".")
            value = getattr(getattr(config, section, None), setting, expected)
            if value != expected:
                said, wanted = ({None: "null"}.get(x, str(x).lower()) for x in (value, expected))
                raise ValueError(f"{name} is {said}, expected {wanted} with distributed.sharding full: {why}")
