"""Settings of the search whose answers expert iteration learns from."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Annotated, Literal

from pydantic import BeforeValidator, model_validator
from pydantic.dataclasses import dataclass

from fastppo.setting_types import STRICT, Count, NonNegative, Share, one_or_more

SAMPLED = ("best-of-n", "majority")
"""Searches that choose among the samples of a step; the others put together an answer of their own."""

TAKEN: dict[str, tuple[str, ...]] = {
    "best-of-n": (),
    "majority": ("answer",),
    "value-guided": ("width", "min_p", "budget"),
    "puct": ("width", "budget", "step", "step_tokens", "simulations", "c_puct"),
}
"""Which settings each search has."""


@dataclass(config=STRICT)
class SearchConfig:
    """`algorithm: expert_iteration`. docs/search.md has the searches, docs/algorithms.md what is learned from them."""

    kind: Literal["best-of-n", "majority", "value-guided", "puct"] = "best-of-n"
    """Of a prompt's samples the one with the highest score, or the one that says what most say; or an answer besides, of which each token is the
    one that the critic likes best, or that a tree of steps has led to."""
    answer: str | None = None
    """`majority`: the regular expression whose last match is what a completion says (its first group, where it has one)."""
    width: Count | None = None
    """`value-guided`: most candidates of a token, by default 8. `puct`: steps that are sampled at a time to follow a node, by default 2."""
    min_p: Share | None = None
    """`value-guided`: tokens less likely than this times the likeliest are no candidates; by default all are candidates."""
    budget: Count | None = None
    """Most tokens that are looked at (`value-guided`; by default width times `rollout.max_new_tokens`) or sampled (`puct`; 8 times) for an answer."""
    step: Annotated[tuple[str, ...], BeforeValidator(one_or_more)] | None = None
    """`puct`: strings that end a step, by default a newline."""
    step_tokens: Count | None = None
    """`puct`: longest step in tokens, by default 64."""
    simulations: Count | None = None
    """`puct`: descents before each step of the answer is chosen, by default 32."""
    c_puct: NonNegative | None = None
    """`puct`: how much the prior weighs against what is known, by default 1."""

    @model_validator(mode="after")
    def _check(self) -> SearchConfig:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if spec.name != "kind" and value is not None and spec.name not in TAKEN[self.kind]:
                taken = ", ".join(TAKEN[self.kind]) or "no setting besides"
                raise ValueError(f"{spec.name} is {value!r}, expected none with kind {self.kind}, which takes {taken}")
        if self.kind == "majority":
            _check_answer(self.answer)
        return self

    def given(self, *names: str) -> dict[str, object]:
        """Those of the settings that are set, by name."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def _check_answer(answer: str | None) -> None:
    if answer is None:
        raise ValueError("answer is None, expected a regular expression with kind majority")
    try:
        re.compile(answer)
    except re.error as error:
        raise ValueError(f"answer is {answer!r}, expected a regular expression: {error}") from error
