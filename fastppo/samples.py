"""The completions of a step that are written to samples.jsonl, with what is known of each token.

A row holds `prompt`, `completion` (without special tokens), `score`, `rewards` (of each function), `ended` ("stop", "length" or "error"),
the token ids `prompt_ids` and `completion_ids`, with `action_mask` where the policy did not choose all of the latter, and for the tokens that it
chose `tokens` (their texts), `logprobs` (as sampled); where the sample was learned from, `advantages` and `values` too; of an episode with an
environment also its `turns` (`completion`, `reward`, `observation`) and the `error` that made it invalid; of a debate its `seat`, the
`transcript` (`seat` and `text` of each speech) and the `error`; `found` is true where a search put the completion together.
A number that is not finite is null.
`fastppo critic` trains on such rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastppo.data import Row
from fastppo.evaluation import Evaluation
from fastppo.model.decoding import token_texts
from fastppo.rewards import RewardResult
from fastppo.rollout import FinishReason, Rollout
from fastppo.targets import Targets

DIGITS = 4  # after the point: enough to look at, a third of the bytes


def describe_samples(
    rollout: Rollout,
    rows: Sequence[Row],
    texts: Sequence[str],
    result: RewardResult,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
) -> list[dict[str, Any]]:
    """The first `count` sequences of a rollout.

    Args:
        rows: [P] the prompts that `rollout.prompt_index` counts. texts: [B] completions.
    """
    count = min(count, len(texts))
    owners, reasons = rollout.prompt_index[:count].tolist(), rollout.finish_reasons[:count].tolist()
    first = rollout.select(range(count))
    found = [False] * count if first.found is None else first.found.tolist()
    chosen, prompts, completions, masks = (
        rollout.tokens[rollout.actions],
        first.prompts(),
        first.completions(),
        _masks(first),
    )
    return [
        {
            "prompt": rows[owners[i]]["prompt"],
            "completion": texts[i],
            "score": _finite(result.scores[i]),
            "rewards": {name: _finite(scores[i]) for name, scores in result.by_name.items()},
            "ended": FinishReason(reasons[i]).name.lower(),
            "prompt_ids": prompts[i],
            "completion_ids": completions[i],
            **({} if all(masks[i]) else {"action_mask": masks[i]}),
            **({"found": True} if found[i] else {}),
            "tokens": token_texts(tokenizer, _of(chosen, rollout.action_bounds, i)),
            "logprobs": _numbers(rollout.logprobs, rollout.action_bounds, i),
        }
        for i in range(count)
    ]


def add_credit(described: Sequence[dict[str, Any] | None], evaluation: Evaluation, targets: Targets) -> None:
    """Add what the critic and the algorithm said of the samples that are learned from.

    Args:
        described: of each sequence of `evaluation` and `targets` its row, None where it has none.
    """
    for place, sample in enumerate(described):
        if sample is not None:
            for name, numbers in (("advantages", targets.advantages), ("values", evaluation.values)):
                if numbers is not None:
                    sample[name] = _numbers(numbers, targets.action_bounds, place)


def _masks(rollout: Rollout) -> list[list[bool]]:
    """Of each completion's tokens, whether the policy chose them."""
    mask, bounds = rollout.action_mask.tolist(), rollout.bounds
    return [mask[bounds[i] + prompt : bounds[i + 1]] for i, prompt in enumerate(rollout.prompt_lengths)]


def _of(numbers: Tensor, bounds: Sequence[int], index: int) -> list:
    return numbers[bounds[index] : bounds[index + 1]].tolist()


def _numbers(numbers: Tensor, bounds: Sequence[int], index: int) -> list[float | None]:
    return [_finite(number, DIGITS) for number in _of(numbers, bounds, index)]


def _finite(number: float, digits: int | None = None) -> float | None:
    if not math.isfinite(number):
        return None
    return number if digits is None else round(number, digits)
