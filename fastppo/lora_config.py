"""Settings of LoRA adapters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, model_validator
from pydantic.dataclasses import dataclass

from fastppo.setting_types import STRICT, OptionalCount, Positive, one_or_more


@dataclass(config=STRICT)
class LoRAConfig:
    """Train low-rank adapters (Hu et al. 2021, arXiv:2106.09685) instead of the weights, which stay as they are. docs/lora.md tells more."""

    r: OptionalCount = 0
    """Rank of the adapters; 0 trains all weights."""
    alpha: Positive = 32.0
    """What an adapter adds is multiplied by alpha / r."""
    target_modules: Annotated[tuple[str, ...], BeforeValidator(one_or_more)] | None = None
    """Names of the linear layers that get one, such as `[q_proj, v_proj]`; by default all but the output head."""
    quantization: Literal["nf4"] | None = None
    """Hold the weights beside the adapters in 4 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314); needs bitsandbytes. Sampling and training
    then run the model's own modules; what is written in the end is the adapters merged into these weights at full width."""

    @model_validator(mode="after")
    def _check_adapters(self) -> LoRAConfig:
        if self.quantization and not self.r:
            raise ValueError(
                f"lora.quantization is {self.quantization}, expected null with lora.r = 0: weights that learn are not quantised"
            )
        return self
