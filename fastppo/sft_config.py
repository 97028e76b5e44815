"""Every setting of supervised fine-tuning, as plain dataclasses. A recipe file (YAML) of `fastppo sft` maps one to one on `SFTRecipe`."""

from __future__ import annotations

from dataclasses import field, fields
from typing import Literal

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from fastppo.config import (
    STRICT,
    CheckpointConfig,
    Count,
    NonNegative,
    OptimizerConfig,
    OptionalCount,
    PathText,
    Seed,
    TrackingConfig,
)
from fastppo.distributed_config import DistributedConfig
from fastppo.evaluation_config import BestConfig
from fastppo.recipe_config import DataConfig, EvalSetConfig, ModelConfig, refuse_eval_set_beside
from fastppo.setting_types import SetName


@dataclass(config=STRICT)
class ExamplesConfig:
    """Which examples are imitated: rows with `prompt` and `completion`, or with `messages`."""

    path: PathText = ""
    """JSON Lines, JSON, CSV, TSV (these also gzipped) or Parquet file, or a hub name of a data set."""
    split: str = "train"
    """Split of a hub data set."""
    eval_path: PathText | None = None
    """Held-out examples, same format; when neither it nor `eval_split` is given, `eval_size` rows are taken off the end of `path`."""
    eval_split: str | None = None
    """Split of the held-out examples, where they come from a hub data set: `eval_path`, or `path` when that is not given."""
    eval_size: OptionalCount = 0
    """Number of held-out rows to evaluate on; 0 evaluates on none."""
    eval_sets: dict[SetName, EvalSetConfig] = field(default_factory=dict)
    """Several sets of held-out examples by their names, in place of the one of `eval_path`, `eval_split` and `eval_size`: docs/sft.md."""
    columns: dict[str, Literal["int", "float", "bool", "json"]] = field(default_factory=dict)
    """What the texts of a column stand for, such as `{messages: json}` of a CSV file."""
    prompt_template: str = "{prompt}"
    """The prompt's text: `{column}` is replaced by a row's value, `{{` and `}}` are braces that stand for themselves."""
    completion_template: str = "{completion}"
    """The completion's text, likewise."""
    system_prompt: str | None = None
    """First message of the conversation, where the tokenizer has a chat template."""
    chat: bool | None = None
    """Apply the tokenizer's chat template; by default when it has one."""
    rendered: bool | None = None
    """Whether the chat template has been applied to the texts already, as in `DataConfig`."""
    max_tokens: Count | None = None
    """Longest example, prompt and completion; by default the model's context. Longer ones are an error unless `drop_long_rows` is set; none is
    cut off, since its end would be wrong."""
    drop_long_rows: bool = False
    """Leave longer examples out (their number is printed) instead of stopping."""

    @model_validator(mode="after")
    def _check_eval_sets(self) -> ExamplesConfig:
        refuse_eval_set_beside(self)
        return self

    def prompts(self) -> DataConfig:
        """The settings that prompts have too."""
        shared = {spec.name for spec in fields(DataConfig)} & {spec.name for spec in fields(self)}
        return DataConfig(**{name: getattr(self, name) for name in shared})


@dataclass(config=STRICT)
class SFTLearnerConfig:
    """How the examples are learned from."""

    epochs: Count = 1
    """Passes over the examples, each in another random order."""
    minibatch_size: Count = 32
    """Examples of one optimizer step; the last step of a run has those that are left."""
    loss_tokens: Literal["completion", "all"] = "completion"
    """Whose mean negative log-likelihood is the loss: the tokens of completions (in conversations, the assistant's turns), or all tokens."""
    tokens_per_microbatch: Count = 8192
    """Most tokens in one forward/backward; gradients accumulate over the micro-batches of a minibatch and do not depend on the split. A single
    longer example makes a micro-batch of its own."""
    max_skipped_updates: Count = 5
    """The run stops after this many non-finite updates in a row; each is skipped and counted."""
    gradient_checkpointing: bool = False
    """Keep one hidden state a layer and compute the rest again in the backward pass: less memory, about a third more time."""


@dataclass(config=STRICT)
class SFTOptimizerConfig(OptimizerConfig):
    """AdamW and the schedule of the learning rate."""

    lr: NonNegative = 1e-5
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Shape after the warm-up; `linear` and `cosine` reach `min_lr_ratio` in the last step."""


@dataclass(config=STRICT)
class SFTEvaluationConfig(BestConfig):
    """Held-out examples, and what their numbers decide."""

    metric: str = "eval/nll"
    """The metric of an evaluation by which the best step is chosen (`keep_best`) and a run ends early (`patience`)."""


@dataclass(config=STRICT)
class SFTCheckpointConfig(CheckpointConfig):
    """Checkpoints."""

    every: OptionalCount = 100
    """Steps between checkpoints, so what a crash or a power cut can cost; 0 saves only at the end and when the run is interrupted."""


@dataclass(config=STRICT)
class SFTConfig:
    """Settings of one supervised fine-tuning, by component; a component may be given as a dict: `SFTConfig(optimizer={"lr": 1e-5})`.

    A *step* is one minibatch of `learner.minibatch_size` examples and the one optimizer step made from it.
    """

    output_dir: PathText = "runs/sft"
    """Folder that receives config, metrics, curve, checkpoints and the model."""
    seed: Seed = 0
    """Seeds the order of the examples. On the CPU a run is bitwise reproducible."""
    device: str = "auto"
    """`auto` (a GPU when there is one), `cpu`, `cuda` or `cuda:N`."""
    learner: SFTLearnerConfig = field(default_factory=SFTLearnerConfig)
    optimizer: SFTOptimizerConfig = field(default_factory=SFTOptimizerConfig)
    evaluation: SFTEvaluationConfig = field(default_factory=SFTEvaluationConfig)
    checkpoint: SFTCheckpointConfig = field(default_factory=SFTCheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    @model_validator(mode="after")
    def _check_sharding(self) -> SFTConfig:
        self.distributed.require_divisible(self)
        return self


@dataclass(config=STRICT)
class SFTRecipe(SFTConfig):
    """A whole run: `fastppo sft RECIPE.yaml section.key=value ...`. The settings, and which model and examples they are for."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: ExamplesConfig = field(default_factory=ExamplesConfig)
