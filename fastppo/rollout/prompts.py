"""What the engine takes as prompts, as lists of token ids."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import takewhile
from numbers import Integral
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastppo.model.packed import context_length
from fastppo.model.tokens import encode_prompt
from fastppo.ops import _checks

EXPECTED = "a list of texts or of lists of token ids, or a tokenizer's output"
ENCODING_KEYS = {"input_ids", "attention_mask", "token_type_ids"}


def encode_prompts(prompts: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[list[int]]:
    """Token ids of each prompt.

    Args:
        prompts: texts, or token ids: lists, arrays or tensors of them, one for each prompt; a tensor or array [B, L] without padding; or what a
            tokenizer or chat template returns for several texts, whose `attention_mask` says what is padding. A prompt may itself be such an
            output for one text.

    Raises:
        TypeError, ValueError: anything else, no prompt, or a prompt that the model cannot go on from; named by its place in `prompts`.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts is a single string, expected a list of prompts")
    if isinstance(prompts, Mapping):
        _check_encoding(prompts, "prompts")
        prompts = prompts["input_ids"] if prompts.get("attention_mask") is None else _unpadded(prompts)
    if not _is_list(prompts) or getattr(prompts, "ndim", 1) == 0:
        raise TypeError(f"prompts is {_kind(prompts)}, expected {EXPECTED}")
    if getattr(prompts, "ndim", 1) == 2:
        _refuse_padding(prompts.tolist(), _special_ids(model, tokenizer))
    if not len(prompts):
        raise ValueError("prompts is empty, expected at least one prompt")
    return [_check(i, _encode_one(i, prompt, tokenizer), model) for i, prompt in enumerate(prompts)]


def _is_list(value: object) -> bool:
    """Something with an order and a length: lists, tuples, tensors, arrays, columns of tables."""
    unordered = isinstance(value, str | bytes | bytearray | Mapping | AbstractSet)
    return isinstance(value, Collection) and hasattr(value, "__getitem__") and not unordered


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a mapping with the keys {', '.join(map(repr, value)) or '(none)'}"
    return f"{value!r}" if isinstance(value, Integral) else type(value).__name__


def _encode_one(index: int, prompt: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[Any]:
    name = f"prompts[{index}]"
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(f"{name} is text, which needs a tokenizer: Engine(model, tokenizer)")
        return encode_prompt(tokenizer, prompt)
    if isinstance(prompt, Mapping):
        _check_encoding(prompt, name)
        mask = prompt.get("attention_mask")
        return _without_padding(_to_list(prompt["input_ids"]), None if mask is None else _to_list(mask), name)
    if not _is_list(prompt) or getattr(prompt, "ndim", 1) == 0:
        raise TypeError(f"{name} is {_kind(prompt)}, expected a text or a list of token ids")
    return _to_list(prompt)


def _unpadded(encoding: Mapping[str, Any]) -> list[list[Any]]:
    """The prompts of a tokenizer's output for several texts, under its mask."""
    rows, masks = _to_list(encoding["input_ids"]), _to_list(encoding["attention_mask"])
    if any(not isinstance(row, Sequence) for row in rows):
        raise TypeError("prompts['input_ids'] holds the ids of a single prompt, expected a list of prompts: [prompts]")
    if len(masks) != len(rows):
        raise ValueError(f"prompts['attention_mask'] has {len(masks)} rows, expected {len(rows)}")
    return [_without_padding(row, masks[i], f"prompts[{i}]") for i, row in enumerate(rows)]


def _check_encoding(encoding: Mapping[str, Any], name: str) -> None:
    """Raises TypeError unless it is what a tokenizer makes of texts alone: other keys would be passed over, or are no prompt at all."""
    if "input_ids" not in encoding or not _is_list(encoding["input_ids"]) or set(encoding) - ENCODING_KEYS:
        raise TypeError(
            f"{name} is {_kind(encoding)}, expected a tokenizer's output: input_ids and its attention_mask "
            "(a chat template renders messages)"
        )


def _without_padding(ids: list[Any], mask: list[int] | None, name: str) -> list[Any]:
    """The ids under a mask of 1 for tokens and, before or after them, 0 for padding."""
    if mask is None:
        return ids
    if not isinstance(mask, Sequence) or len(mask) != len(ids):
        raise ValueError(
            f"the attention_mask of {name} does not have the shape of its input_ids, expected one entry a token"
        )
    kept = [i for i, seen in enumerate(mask) if seen]
    if kept and kept[-1] - kept[0] + 1 != len(kept):
        raise ValueError(f"the attention_mask of {name} has zeros between its tokens, expected them at its ends only")
    return [ids[i] for i in kept]


def _to_list(value: Any) -> list[Any]:
    """Tensors and arrays as lists, those inside a list too."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [item.tolist() if hasattr(item, "tolist") else item for item in value]


def _special_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int | None, set[int]]:
    """The id of padding, and the ids that a prompt may begin or end with on purpose."""
    owner = tokenizer if tokenizer is not None else model.config.get_text_config()
    names = [getattr(owner, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")]
    return names[0], {token for token in names[1:] if isinstance(token, int)}


def _refuse_padding(rows: list[list[Any]], special: tuple[int | None, set[int]]) -> None:
    """Raises ValueError where a rectangle of ids was padded: only a mask could tell how far.

    Where padding is also the token that prompts begin or end with, one of it may stand at that end of every row.
    """
    pad, natural = special
    for rows_from_an_end in (rows, [row[::-1] for row in rows]):
        runs = [_run_length(row, pad) for row in rows_from_an_end]
        allowed = 1 if pad in natural and min(runs, default=0) else 0
        for i, run in enumerate(runs):
            if run > allowed:
                raise ValueError(
                    f"prompts[{i}] begins or ends with padding ({run} times the id {pad}): expected lists without padding, "
                    "or the tokenizer's whole output, whose attention_mask says what is padding"
                )


def _run_length(tokens: list[Any], token: int | None) -> int:
    return sum(1 for _ in takewhile(lambda found: found == token, tokens))


def _check(index: int, tokens: list[Any], model: PreTrainedModel) -> list[int]:
    limit, vocab_size = context_length(model), model.get_input_embeddings().weight.shape[0]
    if not tokens:
        raise ValueError(f"prompts[{index}] is empty, expected at least one token")
    if limit is not None and len(tokens) >= limit:
        raise ValueError(
            f"prompts[{index}] has {len(tokens)} tokens, expected at most {limit - 1}: "
            f"the model's context is {limit} and must hold one new token"
        )
    if odd := [token for token in tokens if not isinstance(token, Integral) or isinstance(token, bool)]:
        raise TypeError(f"prompts[{index}] holds {odd[0]!r}, expected token ids (integers)")
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        raise ValueError(
            f"prompts[{index}] has token ids from {min(tokens)} to {max(tokens)}, expected 0 to {vocab_size - 1}"
        )
    return [int(token) for token in tokens]


def prompt_numbers(numbers: Sequence[int] | None, count: int) -> list[int]:
    """[count] numbers of prompts among those of a larger call; by default 0, 1, ... Raises ValueError where there are not so many."""
    if numbers is None:
        return list(range(count))
    found = [_checks.integer_number(f"numbers[{i}]", number, at_least=0) for i, number in enumerate(numbers)]
    if len(found) != count:
        raise ValueError(f"numbers has {len(found)} entries, expected {count}, one for each prompt")
    return found
