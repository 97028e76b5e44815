"""Completions with their scores from files, token for token: what `fastppo critic` learns from.

A file is JSON Lines, such as a run's `samples.jsonl`; a row has

    prompt_ids      token ids that the model read
    completion_ids  those that followed, end-of-sequence included
    score           a number, or null where the completion has no valid score: it is passed over
    action_mask     optional: of each of completion_ids, whether the policy chose it; else it chose all
    ended           optional: "length" where the completion was cut off, for `reward.missing_eos_penalty`
    completion      optional: the completion's text without special tokens, which the ids then have to spell
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from fastppo.data.files import read_json_lines
from fastppo.model.decoding import decode
from fastppo.rollout import FinishReason, Rollout
from fastppo.rollout.record import bounds_of


class StoredRollout(NamedTuple):
    prompt_ids: list[int]
    completion_ids: list[int]
    action_mask: list[bool]
    """Of each of `completion_ids`."""
    score: float
    cut_off: bool
    """By the length limit."""


class Limits(NamedTuple):
    """What a model can read."""

    vocab_size: int
    context: int | None
    """Tokens of prompt and completion; None for any number."""


def read_rollouts(
    paths: Iterable[str | Path], tokenizer: PreTrainedTokenizerBase, limits: Limits
) -> tuple[list[StoredRollout], int]:
    """(rows with a valid score and an action, in order; how many others there were).

    Raises ValueError naming file, line and key of a row that cannot be used, and where none is left.
    """
    found, others, places = [], 0, [str(path) for path in paths]
    for path in places:
        if not Path(path).expanduser().is_file():
            raise ValueError(f"rollouts is {path!r}, expected a JSON Lines file: there is none of that name")
        for where, row in read_json_lines(Path(path).expanduser()):
            stored = _stored(where, row, tokenizer, limits)
            if stored is None:
                others += 1
            else:
                found.append(stored)
    if not found:
        raise ValueError(f"rollouts {', '.join(places)} hold no completion with a valid score ({others} without)")
    return found, others


def as_rollout(stored: Sequence[StoredRollout], device: torch.device) -> Rollout:
    """Packed; what is known of the sampling alone (log-probs, temperature) is 0 and 1, which no loss of a critic reads."""
    sequences = [row.prompt_ids + row.completion_ids for row in stored]
    masks = [[False] * len(row.prompt_ids) + row.action_mask for row in stored]
    mask = torch.tensor([each for own in masks for each in own], dtype=torch.bool, device="cpu")
    prompts: dict[tuple[int, ...], int] = {}
    nothing = torch.zeros(int(mask.sum()), dtype=torch.float32, device=device)
    reasons = [FinishReason.LENGTH if row.cut_off else FinishReason.STOP for row in stored]
    return Rollout(
        tokens=_int64([token for own in sequences for token in own], device),
        cu_seqlens=_int64(bounds_of(map(len, sequences)), device).int(),
        position_ids=_int64([place for own in sequences for place in range(len(own))], device),
        action_mask=mask.to(device),
        logprobs=nothing,
        processed_logprobs=nothing,
        finish_reasons=_int64(reasons, device).to(torch.int8),
        prompt_index=_int64([prompts.setdefault(tuple(row.prompt_ids), len(prompts)) for row in stored], device),
        temperature=1.0,
    )


def _int64(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def _stored(where: str, row: Any, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> StoredRollout | None:
    """None for a row without a valid score, or without a token that the policy chose."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is {type(row).__name__}, expected a row with prompt_ids, completion_ids and score")
    for key in ("prompt_ids", "completion_ids", "score"):
        if key not in row:
            raise ValueError(f"{where} has no {key}, expected prompt_ids, completion_ids and score")
    prompt, completion = (_ids(where, row, key, limits) for key in ("prompt_ids", "completion_ids"))
    score, mask = row["score"], row.get("action_mask", [True] * len(completion))
    if not prompt:
        raise ValueError(f"{where}: prompt_ids is empty, expected a token at least, whose state has the first value")
    if isinstance(score, bool) or not isinstance(score, int | float | None):
        raise ValueError(f"{where}: score is {score!r}, expected a number or null")
    if not isinstance(mask, list) or len(mask) != len(completion) or not all(isinstance(each, bool) for each in mask):
        raise ValueError(
            f"{where}: action_mask is no list of true and false for each of {len(completion)} completion_ids"
        )
    if limits.context is not None and len(prompt) + len(completion) > limits.context:
        raise ValueError(
            f"{where} has {len(prompt) + len(completion)} tokens, expected at most {limits.context}, the critic's context"
        )
    _check_text(where, row, completion, tokenizer)
    if score is None or not math.isfinite(score) or not any(mask):
        return None
    return StoredRollout(prompt, completion, mask, float(score), row.get("ended") == "length")


def _ids(where: str, row: Mapping[str, Any], key: str, limits: Limits) -> list[int]:
    ids = row[key]
    if not isinstance(ids, list) or not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
        raise ValueError(f"{where}: {key} is {str(ids)[:50]!r}, expected a list of token ids")
    if odd := [each for each in ids if not 0 <= each < limits.vocab_size]:
        raise ValueError(
            f"{where}: {key} holds {odd[0]}, expected ids from 0 to {limits.vocab_size - 1}, the rows of the critic's embedding"
        )
    return ids


def _check_text(where: str, row: Mapping[str, Any], ids: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where the row says what its completion reads, and the ids do not: they are another tokenizer's."""
    if not isinstance(row.get("completion"), str):
        return
    text = decode(tokenizer, ids, skip_special_tokens=True)
    if text != row["completion"]:
        raise ValueError(
            f"{where}: completion_ids read {text[:50]!r}, expected {row['completion'][:50]!r}, its completion: they are another tokenizer's ids"
        )
