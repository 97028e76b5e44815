"""Settings of the critic: what it is made of, how it says a value, how and when it learns."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from fastppo.setting_types import STRICT, Count, NonNegative, OptionalCount, PathText, Positive, Share

VALUE_CLIP = 0.2


@dataclass(config=STRICT)
class CriticConfig:
    """The critic and its loss. docs/critics.md has the kinds, their memory and the formulas."""

    kind: Literal["separate", "shared", "lora", "none"] | None = None
    """A critic with its own trunk, or a value head on the policy's trunk, or that and an adapter of its own, or none; by default `separate`
    (with `lora.r` above 0 `lora`) with the `advantage.estimator` that have a critic, and `none` with the others."""
    model: PathText | None = None
    """Folder or hub name of a causal language model with the policy's tokenizer, such as a smaller one, or the folder of a critic that
    `fastppo critic` has trained: the separate critic starts from its trunk instead of the policy's."""
    freeze_attention: bool = False
    """The attention of a separate critic stays as it is; everything else of it learns (SAO, arXiv:2607.07508, section 3.2)."""
    head: Literal["scalar", "two-hot", "hl-gauss"] = "scalar"
    """How a value is said: as a number, learned by its squared error, or as the mean of a histogram, learned by cross-entropy with the return between
    two bins (`two-hot`) or spread as a normal distribution (`hl-gauss`; Farebrother et al. 2024, arXiv:2403.03950)."""
    bins: Annotated[int, Field(ge=2)] = 101
    """Bins of a histogram."""
    value_range: tuple[float, float] | None = None
    """(lowest, highest) value of a histogram's bins; returns beyond it are learned as its ends."""
    lr: NonNegative = 5e-6
    """Peak learning rate of the critic (separate trunk, or the shared trunk's value head)."""
    lr_warmup_steps: OptionalCount | None = None
    """Steps in which its learning rate rises linearly from 0; `None` is `optimizer.warmup_steps`."""
    weight_decay: NonNegative | None = None
    """AdamW's decoupled weight decay of the critic; `None` is the policy's, in `optimizer`."""
    max_grad_norm: Positive | None = None
    """The critic's gradient is clipped to this norm; `None` is the policy's, in `optimizer`."""
    epochs: Count | None = None
    """Passes of a critic that is not shared over a rollout; `None` is `learner.epochs`. The critic's targets are those before the first."""
    tokens_per_microbatch: Count | None = None
    """Most tokens in one forward/backward of a critic that is not shared; `None` is `learner.tokens_per_microbatch`."""
    warmup_steps: OptionalCount = 0
    """First steps in which only the critic learns."""
    warmup_explained_var: Share | None = None
    """After these, still only the critic learns until its values explain this share of the variance of a step's returns (`val/explained_var`)."""
    max_warmup_steps: Count = 100
    """Most steps of a warm-up that waits for it; then the policy learns whatever the values explain."""
    value_clip: Positive | None = VALUE_CLIP
    """Clip range of the value around the rollout's value; `None` is off, and so is a histogram's."""
    vf_coef: NonNegative = 0.1
    """Weight of the value loss. With a separate critic it only scales that critic's gradient before clipping."""

    @model_validator(mode="after")
    def _check_head(self) -> CriticConfig:
        if self.head == "scalar":
            if self.value_range is not None:
                raise ValueError(f"value_range is {list(self.value_range)}, expected none with head scalar")
            return self
        if self.value_range is None:
            raise ValueError(f"value_range is None, expected the lowest and the highest value with head {self.head}")
        low, high = self.value_range
        if not float("-inf") < low < high < float("inf"):
            raise ValueError(f"value_range is {[low, high]}, expected finite numbers, the lower one first")
        if self.value_clip not in (None, VALUE_CLIP):
            raise ValueError(
                f"value_clip is {self.value_clip}, expected none with head {self.head}, whose loss has no clip"
            )
        self.value_clip = None
        return self


_OF_A_CRITIC = ("freeze_attention", "model", "epochs", "tokens_per_microbatch", "warmup_steps", "warmup_explained_var")
_OF_ITS_WEIGHTS = ("freeze_attention", "model")
_OF_A_TRUNK = (*_OF_ITS_WEIGHTS, "epochs", "tokens_per_microbatch")


def refuse_unused(critic: CriticConfig, estimator: str) -> None:
    """Raises ValueError for a setting that would do nothing: of a critic where there is none, of a trunk where the critic has none of its own."""
    names, why = {
        "none": (_OF_A_CRITIC, f"critic.kind none (advantage.estimator {estimator})"),
        "shared": (_OF_A_TRUNK, "critic.kind shared, whose trunk is the policy's"),
        "lora": (_OF_ITS_WEIGHTS, "critic.kind lora, whose trunk is the policy's"),
    }.get(critic.kind, ((), ""))
    defaults = {spec.name: spec.default for spec in fields(CriticConfig)}
    for name in names:
        if getattr(critic, name) != defaults[name]:
            raise ValueError(f"critic.{name} is {getattr(critic, name)}, expected {defaults[name]} with {why}")
