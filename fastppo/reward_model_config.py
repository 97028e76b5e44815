"""Every setting of `fastppo reward-model`, as plain dataclasses. A recipe file (YAML) maps one to one on `RewardModelRecipe`."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from fastppo.evaluation_config import CheckpointConfig
from fastppo.setting_types import STRICT, Count, NonNegative, OptionalCount, PathText, Positive


@dataclass(config=STRICT)
class BaseModelConfig:
    """What the reward model is made from."""

    name: PathText = ""
    """Folder in Transformers' format, or a hub name: a language model, which gets a new head of one score, or a reward model."""
    tokenizer: PathText | None = None
    """Folder or hub name of the tokenizer; the model's own when not given."""


@dataclass(config=STRICT)
class PreferencesConfig:
    """Which pairs it is trained on: rows with `chosen` and `rejected`, and, where they have them, `prompt` and `margin`."""

    path: PathText = ""
    """JSON Lines, JSON, CSV, TSV (these also gzipped) or Parquet file, or a hub name of a data set."""
    split: str = "train"
    """Split of a hub data set."""
    eval_path: PathText | None = None
    """Held-out pairs, same format; when neither it nor `eval_split` is given, `eval_size` rows are taken off the end of `path`."""
    eval_split: str | None = None
    """Split of the held-out pairs, where they come from a hub data set: `eval_path`, or `path` when that is not given."""
    eval_size: Count = 100
    """Number of held-out pairs that the finished model is judged on."""
    columns: dict[str, Literal["int", "float", "bool", "json"]] = field(default_factory=dict)
    """What the texts of a column stand for, such as `{chosen: json, margin: float}` of a CSV file."""


@dataclass(config=STRICT)
class RewardTrainingConfig:
    """The loss and its optimizer (AdamW)."""

    epochs: Count = 1
    """Passes over the pairs."""
    lr: NonNegative = 1e-5
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Shape after the warm-up; `linear` and `cosine` reach 0."""
    warmup_steps: OptionalCount = 0
    """Steps in which the learning rate rises linearly from 0."""
    batch_size: Count = 32
    """Pairs of one optimizer step."""
    microbatch_size: Count = 8
    """Pairs of one forward and backward pass; gradients accumulate over those of a batch."""
    max_length: Count = 1024
    """Most tokens of a text, prompt included; pairs with a longer one are left out, and their number is said."""
    center_coef: NonNegative = 0.01
    """Weight of (chosen score + rejected score)², which holds the scores of all pairs around 0 (Eisenstein et al. 2023, arXiv:2312.09244,
    equation 2); 0 is off."""
    weight_decay: NonNegative = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Positive = 1.0
    """The gradient is clipped to this norm."""
    gradient_checkpointing: bool = False
    """Compute the hidden states again in the backward pass: less memory, more time."""

    @model_validator(mode="after")
    def _check_batches(self) -> RewardTrainingConfig:
        if self.batch_size % min(self.microbatch_size, self.batch_size):
            raise ValueError(
                f"batch_size is {self.batch_size}, expected a multiple of microbatch_size = {self.microbatch_size}"
            )
        return self


@dataclass(config=STRICT)
class RewardCheckpointConfig(CheckpointConfig):
    """Checkpoints."""

    every: OptionalCount = 100
    """Steps between checkpoints, so what a crash or a power cut can cost; 0 saves only at the end and when the training is interrupted."""


@dataclass(config=STRICT)
class RewardModelRecipe:
    """A reward model: `fastppo reward-model RECIPE.yaml section.key=value ...`."""

    output_dir: PathText = "runs/reward_model"
    """Folder that receives model/, metrics.json, calibration.png, settings and checkpoints; new or empty, unless a training is resumed."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seeds the new head and the order of the pairs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is a GPU when there is one. Weights are float32; a GPU computes in bfloat16 where it can."""
    model: BaseModelConfig = field(default_factory=BaseModelConfig)
    data: PreferencesConfig = field(default_factory=PreferencesConfig)
    training: RewardTrainingConfig = field(default_factory=RewardTrainingConfig)
    checkpoint: RewardCheckpointConfig = field(default_factory=RewardCheckpointConfig)
