"""Settings of what a run does beside learning: evaluations, the checkpoints that are kept, which prompts come less often."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from fastppo.ops import _checks
from fastppo.ops.sample_tokens import TEMPERATURES
from fastppo.setting_types import STRICT, Count, NonNegative, OptionalCount, Share


def _one_or_more(value: Any) -> Any:
    """A number as a list of one: `evaluation.pass_at_k=4`."""
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


@dataclass(config=STRICT)
class BestConfig:
    """When a run is evaluated, and what that decides."""

    every: OptionalCount = 0
    """Steps between evaluations; 0 evaluates only before and after training."""
    metric: str = ""
    """The metric of an evaluation by which the best step is chosen (`keep_best`) and a run ends early (`patience`)."""
    goal: Literal["max", "min"] | None = None
    """Which values of it are better; by default small ones where its name ends in `failures`, `mean_length`, `nll` or `perplexity`, else large
    ones."""
    keep_best: bool = False
    """Keep a checkpoint of the best step, beside the newest ones; in the end its model is written to `best` in the run folder."""
    patience: Count | None = None
    """The run ends after this many evaluations in a row without an improvement; `None` is off."""
    min_improvement: NonNegative = 0.0
    """Only a change by more than this, since the last one that was, is an improvement for `patience`."""

    @model_validator(mode="after")
    def _check_patience(self) -> BestConfig:
        if self.patience is not None and self.every == 0:
            raise ValueError(
                f"patience is {self.patience}, expected None with every 0, which evaluates no step between"
            )
        return self


@dataclass(config=STRICT)
class EvaluationConfig(BestConfig):
    """Held-out prompts, and what their numbers decide. docs/evaluation.md has the metrics."""

    metric: str = "eval/scores"
    """The metric of an evaluation by which the best step is chosen (`keep_best`) and a run ends early (`patience`)."""
    temperature: float = 0.0
    """Sampling temperature of the evaluation; 0 is greedy."""
    samples: Count = 1
    """Completions of each held-out prompt."""
    pass_at_k: Annotated[tuple[Count, ...], BeforeValidator(_one_or_more)] = ()
    """Each k gives `eval/pass@k`: how likely one of k completions of a prompt has at least `reward.solved_score` (Chen et al. 2021,
    arXiv:2107.03374, section 2.1); at most `samples`."""
    greedy: bool = False
    """The greedy completion of each prompt besides, as `eval/greedy/...`."""

    @model_validator(mode="after")
    def _check_samples(self) -> EvaluationConfig:
        _checks.number_or_zero("temperature", self.temperature, **TEMPERATURES)
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"samples is {self.samples}, expected 1 with temperature 0, at which all would be the same"
            )
        if self.temperature == 0 and self.greedy:
            raise ValueError("greedy is True, expected False with temperature 0, at which the sample is the greedy one")
        if self.pass_at_k and max(self.pass_at_k) > self.samples:
            raise ValueError(
                f"pass_at_k is {list(self.pass_at_k)}, expected at most samples = {self.samples}, the completions of a prompt"
            )
        return self


@dataclass(config=STRICT)
class CheckpointConfig:
    """Checkpoints."""

    every: OptionalCount = 10
    """Steps between checkpoints, so what a crash or a power cut can cost; 0 saves only at the end and when the run is interrupted."""
    keep: Count = 2
    """Newest checkpoints kept."""


@dataclass(config=STRICT)
class DifficultyConfig:
    """Pools of prompts by how often they are solved (`reward.solved_score`), so that those which teach nothing come less often."""

    easy_weight: Annotated[float, Field(ge=0.01, le=1)] = 1.0
    """How often a prompt comes that is always solved, as a share of what it would; 1 is as often as any."""
    hard_weight: Annotated[float, Field(ge=0.01, le=1)] = 1.0
    """The same of a prompt that is never solved."""
    easy_rate: Share = 1.0
    """A prompt is easy when at least this share of its latest completions solve it."""
    hard_rate: Share = 0.0
    """A prompt is hard when at most this share of its latest completions solve it."""
    min_samples: Count = 8
    """A prompt's latest completions are those of its last steps, as many steps as it takes to have this many; with fewer it is in no pool."""

    @model_validator(mode="after")
    def _check_rates(self) -> DifficultyConfig:
        if self.hard_rate >= self.easy_rate:
            raise ValueError(f"hard_rate is {self.hard_rate}, expected less than easy_rate = {self.easy_rate}")
        return self
