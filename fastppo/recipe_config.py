"""What a recipe names besides the settings of a PPO run: model, data and rewards. A recipe file (YAML) maps one to one on `Recipe`."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from fastppo.config import PPOConfig, RewardConfig
from fastppo.debate_config import Debate
from fastppo.environment_config import EnvironmentConfig
from fastppo.setting_types import STRICT, Count, OptionalCount, PathText, SetName


@dataclass(config=STRICT)
class ModelConfig:
    """Which model a recipe trains."""

    name: PathText = ""
    """Folder in Transformers' format, or a hub name."""
    tokenizer: PathText | None = None
    """Folder or hub name of the tokenizer; the model's own when not given."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weight type; `auto` is float32 on the CPU and bfloat16 on a GPU."""


@dataclass(config=STRICT)
class EvalSetConfig:
    """One of a recipe's several sets of held-out prompts or examples."""

    path: PathText | None = None
    """As `data.path`, which it is when not given, with another `split`; no task."""
    split: str | None = None
    """Split of a hub data set; `data.split` when not given."""
    size: Count | None = None
    """How many of its first rows are taken; all when not given."""


def refuse_eval_set_beside(data: Any) -> None:
    """Raises ValueError where a recipe's data have `eval_sets`, and one held-out set besides."""
    for name, off in {"eval_path": None, "eval_split": None, "eval_size": 0}.items():
        if data.eval_sets and getattr(data, name) != off:
            raise ValueError(f"{name} is {getattr(data, name)!r}, expected {off} with eval_sets, which have their own")


@dataclass(config=STRICT)
class DataConfig:
    """Which prompts a recipe trains on."""

    path: PathText = ""
    """JSON Lines, JSON, CSV, TSV (these also gzipped) or Parquet file, a hub name of a data set, or `reasoning_gym:TASK`."""
    split: str = "train"
    """Split of a hub data set."""
    eval_path: PathText | None = None
    """Held-out prompts, same format; when neither it nor `eval_split` is given, `eval_size` rows are taken off the end of `path`."""
    eval_split: str | None = None
    """Split of the held-out prompts, where they come from a hub data set: `eval_path`, or `path` when that is not given."""
    eval_size: OptionalCount = 0
    """Number of held-out prompts to evaluate on; 0 evaluates on none."""
    eval_sets: dict[SetName, EvalSetConfig] = field(default_factory=dict)
    """Several sets of held-out prompts by their names, in place of the one of `eval_path`, `eval_split` and `eval_size`: docs/evaluation.md."""
    task_arguments: dict[str, Any] = field(default_factory=dict)
    """Of a `reasoning_gym:TASK`: `size` (500), `seed` (0) and the task's own settings."""
    columns: dict[str, Literal["int", "float", "bool", "json"]] = field(default_factory=dict)
    """What the texts of a column stand for, such as `{level: int}`; undeclared, what is text in a file stays that text."""
    prompt_template: str = "{prompt}"
    """The prompt's text: `{column}` is replaced by a row's value, `{{` and `}}` are braces that stand for themselves."""
    system_prompt: str | None = None
    """First message of the conversation, where the tokenizer has a chat template."""
    chat: bool | None = None
    """Apply the tokenizer's chat template; by default when it has one."""
    rendered: bool | None = None
    """Whether the chat template has been applied to the texts already: `true` reads them as they stand, `false` as texts like any other;
    by default one that has the template's special tokens is an error."""
    max_prompt_tokens: Count | None = None
    """Longest prompt; longer ones are an error unless `drop_long_prompts` is set."""
    drop_long_prompts: bool = False
    """Leave longer prompts out (their number is printed) instead of stopping."""

    @model_validator(mode="after")
    def _check_eval_sets(self) -> DataConfig:
        refuse_eval_set_beside(self)
        return self


@dataclass(config=STRICT)
class RewardFunctionConfig:
    """One of a recipe's reward functions."""

    function: PathText
    """A ready one (`gsm8k`; docs/rewards.md has them all), `package.module:function`, or `path/to/file.py:function` (relative to the recipe)."""
    weight: Annotated[float, Field(strict=True, allow_inf_nan=False)] = 1.0
    """What its score is multiplied by in the sum; not 0."""
    normalise: bool = False
    """Subtract the mean of the step's valid scores of this function and divide by their standard deviation, before the weight is applied."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments bound to the function for every call. `${env:NAME}` in a text stands for an environment variable, whose value no file
    of the run ever holds."""

    @model_validator(mode="after")
    def _check_weight(self) -> RewardFunctionConfig:
        if self.weight == 0:
            raise ValueError("weight is 0, expected another number (leave the function out)")
        return self


@dataclass(config=STRICT)
class RecipeRewardConfig(RewardConfig):
    """Which rewards a recipe maximises, and how they are called."""

    functions: list[RewardFunctionConfig] = field(default_factory=list)
    """The reward functions; the weighted sum of those that apply is maximised."""


@dataclass(config=STRICT)
class RecipeEnvironmentConfig(EnvironmentConfig):
    """What a recipe's policy talks to, and how episodes with it are played; at most one of `factory`, `tools`,
    `agent`, `command` and `debate` is set."""

    factory: PathText | None = None
    """What makes an environment: that of another library (`textarena`; docs/environments.md has them all), or a class for instance,
    `package.module:Name` or `path/to/file.py:Name` (relative to the recipe)."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments that it is called with. `${env:NAME}` in a text stands for an environment variable."""
    tools: list[str] = field(default_factory=list)
    """Functions that the policy may call before it answers: `calculator`, `python` (`fastppo.envs.PythonSandbox`), or written as `factory` is."""
    debate: Debate | None = None
    """Seats that speak in turn, each of them the policy: docs/debate.md."""

    agent: PathText | None = None
    """A function that is `fastppo.envs.AgentProgram`'s program, written as `factory` is."""
    command: list[str] = field(default_factory=list)
    """Or a command that is, as a list of words; one that ends with `.py` is a file, relative to the recipe."""

    @model_validator(mode="after")
    def _check_one(self) -> RecipeEnvironmentConfig:
        given = [name for name in ("factory", "tools", "agent", "command", "debate") if getattr(self, name)]
        if len(given) > 1:
            said = "has speeches" if given[1] == "debate" else f"is {getattr(self, given[1])!r}"
            raise ValueError(f"{given[1]} {said}, expected none beside {given[0]}")
        if self.arguments and not self.factory:
            raise ValueError(f"arguments is {self.arguments}, expected none without factory")
        return self


@dataclass(config=STRICT)
class Recipe(PPOConfig):
    """A whole run: `fastppo train RECIPE.yaml section.key=value ...`. PPO's settings, and which model, prompts and reward they are for."""

    reward: RecipeRewardConfig = field(default_factory=RecipeRewardConfig)
    environment: RecipeEnvironmentConfig = field(default_factory=RecipeEnvironmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
