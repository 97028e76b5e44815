"""Settings of a run that several processes make."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from fastppo.setting_types import STRICT, Count, Positive

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
SAMPLED_TOGETHER = {"algorithm": "ppo", "lora.r": 0}
"""Settings of a run -> what they have to be where ranks sample together."""


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
    tensor_parallel: Count = 1
    """How many ranks sample together, with sharding `full`: each has a part of the weights that are sampled from, and of the keys and values, by the
    plan that Transformers has for the model's family (`tp_plan`). A divisor of the number of ranks and of the model's numbers of heads. 1: each rank
    samples from a whole copy."""

    @model_validator(mode="after")
    def _check_sharding(self) -> DistributedConfig:
        for name, off in {"reduce_dtype": "float32", "cpu_offload": False, "tensor_parallel": 1}.items():
            if self.sharding == "none" and getattr(self, name) != off:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {off} with sharding none")
        return self

    def require_divisible(self, config: Any) -> None:
        """Raises ValueError for a setting of a run's `config` that sharding does not go with."""
        for name, (expected, why) in UNDIVIDED.items() if self.sharding == "full" else ():
            value = _setting(config, name, expected)
            if value != expected:
                said, wanted = ({None: "null"}.get(x, str(x).lower()) for x in (value, expected))
                raise ValueError(f"{name} is {said}, expected {wanted} with distributed.sharding full: {why}")
        for name, expected in SAMPLED_TOGETHER.items() if self.tensor_parallel > 1 else ():
            if (value := _setting(config, name, None)) != expected:
                ranks = f"distributed.tensor_parallel is {self.tensor_parallel}, expected 1"
                raise ValueError(
                    f"{ranks} with {name} {value}" if value else f"{ranks}: supervised fine-tuning samples nothing"
                )


def _setting(config: Any, name: str, default: Any) -> Any:
    """Of a dotted name; `default` where a run has no such setting."""
    for part in name.split("."):
        config = getattr(config, part, default)
    return config
