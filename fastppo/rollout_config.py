"""Settings of how completions are sampled."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from fastppo.ops.sample_tokens import TEMPERATURES
from fastppo.rollout.sampling import SamplingParams
from fastppo.setting_types import STRICT, Count, OptionalCount, Share


@dataclass(config=STRICT)
class RolloutConfig:
    """How completions are sampled."""

    prompts_per_step: Count = 32
    """Prompts drawn for each step."""
    samples_per_prompt: Count = 1
    """Completions sampled for each prompt."""
    max_new_tokens: Count = 256
    """Longest completion; a completion that reaches it is truncated, not terminated."""
    min_new_tokens: OptionalCount = 0
    """End-of-sequence is banned before this many tokens."""
    temperature: Annotated[float, Field(ge=TEMPERATURES["smallest"], le=TEMPERATURES["at_most"])] = 1.0
    """Divides the logits of the policy *and* of the reference."""
    top_k: OptionalCount = 0
    """Sample from the k most likely tokens; 0 is off."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling mass; 1 is off."""
    min_p: Share = 0.0
    """Drop tokens less likely than this times the most likely one; 0 is off."""
    stop_token_ids: tuple[OptionalCount, ...] = ()
    """Token ids that end a completion besides those that generation config, tokenizer and chat template name (`fastppo info MODEL`)."""
    stop_strings: tuple[str, ...] = ()
    """Strings that end a completion as soon as its text contains one of them."""
    ignore_eos: bool = False
    """Only `stop_token_ids` and `stop_strings` end a completion."""
    batch_size: Count = 64
    """Sequences that are decoded side by side."""
    dynamic_sampling: bool = False
    """Leave out the prompts whose samples all have the same score, and sample for others until there are `prompts_per_step` without them (DAPO,
    arXiv:2503.14476, section 3.2)."""
    max_sampling_rounds: Count = 10
    """Most rollouts of `prompts_per_step` prompts that a step with `dynamic_sampling` makes; then it learns from what it has."""
    staleness: Literal[0, 1] = 0
    """By how many steps the weights that sample may be behind those that learn. `0`: a step samples, then learns. `1`: while a step's update goes on,
    the completions of the next one are sampled from a copy of the weights as they were before it, and `loss.rollout_correction` (`truncate` unless
    set), `advantage.estimator` `vtrace` or `recompute_logprobs` `never` reckons with that. docs/overlap.md."""
    recompute_logprobs: Literal["auto", "always", "never"] = "auto"
    """The log-probabilities that the ratio is taken against: `always` from a forward pass of the policy; `auto` those of sampling, once a step
    has shown that the two have the same bits (a Llama-like model in float32 on a CPU, or with `exact`); `never` those of sampling whatever
    their bits. With `staleness` `auto` is `always`."""
    exact: bool = False
    """A token of the policy has the same bits sampled, scored and trained on a GPU too, where a Llama-like model without adapters then runs by
    the kernels of its decode steps, slower ones, in all three. On a CPU in float32 it always has."""

    @model_validator(mode="after")
    def _check_lengths(self) -> RolloutConfig:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}, expected at most max_new_tokens = {self.max_new_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _check_samples(self) -> RolloutConfig:
        if self.dynamic_sampling and self.samples_per_prompt < 2:
            raise ValueError(
                f"samples_per_prompt is {self.samples_per_prompt}, expected at least 2 with dynamic_sampling, which compares them"
            )
        return self

    def sampling(self, seed: int) -> SamplingParams:
        """What the sampler is asked for."""
        shared = {field.name for field in fields(SamplingParams)} & {field.name for field in fields(self)}
        return SamplingParams(n=self.samples_per_prompt, seed=seed, **{name: getattr(self, name) for name in shared})
