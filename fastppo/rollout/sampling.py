"""How completions are sampled."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fastppo.ops import _checks
from fastppo.ops.sample_tokens import TEMPERATURES


@dataclass(frozen=True)
class SamplingParams:
    """Settings of one `Engine.generate` call, the same for all its prompts.

    A top-k, top-p or min-p that is on changes the distribution that is sampled from; a `Rollout` holds the log-probabilities of both.
    """

    n: int = 1
    """Completions of each prompt."""
    temperature: float = 1.0
    """Divides the logits, from 1e-10 to 1e10; or 0, which takes the most likely token."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 is off."""
    top_p: float = 1.0
    """Sample from the fewest tokens that together have this probability; 1 is off."""
    min_p: float = 0.0
    """Leave out tokens less likely than this times the most likely one; 0 is off."""
    max_new_tokens: int = 128
    """Longest completion in tokens. It is cut to what the model's context leaves beside the prompt."""
    min_new_tokens: int = 0
    """Stop ids and end-of-sequence are banned, and stop strings ignored, before this many tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a completion besides those of the model and its tokenizer (`ending_ids`); the completion keeps them."""
    stop_strings: tuple[str, ...] = ()
    """Strings that end a completion; it keeps all tokens up to the one that completes the string. Needs a tokenizer."""
    ignore_eos: bool = False
    """What ends a completion for the model, its tokenizer and its chat template does not: `stop_token_ids` and `stop_strings` alone do."""
    seed: int = 0
    """A token depends on the seed, the number of its sequence and its position only, not on the rest of the batch."""

    def __post_init__(self) -> None:
        for name in ("n", "max_new_tokens"):
            _checks.integer_number(name, getattr(self, name), at_least=1)
        for name in ("top_k", "min_new_tokens", "seed"):
            _checks.integer_number(name, getattr(self, name))
        _checks.number_or_zero("temperature", self.temperature, **TEMPERATURES)
        _checks.number("top_p", self.top_p, above=0, at_most=1)
        _checks.number("min_p", self.min_p, at_least=0, at_most=1)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}, expected at most max_new_tokens = {self.max_new_tokens}"
            )
        object.__setattr__(self, "stop_token_ids", _as_tuple("stop_token_ids", self.stop_token_ids))
        object.__setattr__(self, "stop_strings", _as_tuple("stop_strings", self.stop_strings))
        for i, token in enumerate(self.stop_token_ids):
            _checks.integer_number(f"stop_token_ids[{i}]", token)
        for i, text in enumerate(self.stop_strings):
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop_strings[{i}] is {text!r}, expected a string that is not empty")


def _as_tuple(name: str, value: object) -> tuple:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError(f"{name} is {value!r}, expected a tuple or list")
    return tuple(value)
