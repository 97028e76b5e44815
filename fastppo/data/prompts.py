"""Data sets of prompts: rows with their prompt's text and token ids, held to the lengths that fit, split into training and held-out."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastppo.config import DataConfig
from fastppo.data.sources import Row, check_rows, rows_of
from fastppo.data.writer import PromptWriter, use_chat_template

PROMPT_COLUMNS = ("prompt", "prompt_ids")
"""What a row gets here: not among the columns that reward functions are given."""

logger = logging.getLogger(__name__)


class PromptDataset:
    """Rows of a data set with their prompts ready for the model.

    `dataset[i]` is a dict of the row's columns (None where other rows have a column that it lacks) and

    - `prompt`: the text before any chat template, or the messages of a conversation, as reward functions take it; the whole data set
      has one kind or the other.
    - `prompt_ids`: list[int], what the model reads: the text with the tokenizer's own special tokens, or the chat template's output.

    Args:
        rows: dicts from column to value.
        tokenizer: makes the ids; its chat template serves conversations, and texts too unless `config.chat` says otherwise.
        config: `prompt_template`, `system_prompt`, `chat`, `max_prompt_tokens` and `drop_long_prompts` are read.
        max_prompt_tokens: longest prompt that the model's context has room for; None for no limit.
        first_row: number of the first row in its source, for messages.

    Raises:
        ValueError: no rows, an empty or too long prompt, an unknown column or one that makes no prompt, settings that do not fit the tokenizer.
        TypeError: rows that are neither texts, conversations nor dicts.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        max_prompt_tokens: int | None = None,
        *,
        first_row: int = 0,
    ) -> None:
        columns = check_rows(rows)
        chat = use_chat_template(tokenizer, config)
        write = PromptWriter(tokenizer, config, chat, columns)
        self._rows = [write({name: row.get(name) for name in columns}, first_row + i) for i, row in enumerate(rows)]
        write.require_one_kind()
        for i, ids in enumerate(_tokenize(write.texts, tokenizer, chat)):
            if not ids:
                raise ValueError(
                    f"the tokenizer makes no token of the prompt of row {first_row + i}: {write.texts[i]!r}"
                )
            self._rows[i]["prompt_ids"] = ids
        self._numbers = list(range(first_row, first_row + len(rows)))
        self._drop_long_prompts = config.drop_long_prompts
        limits = [limit for limit in (config.max_prompt_tokens, max_prompt_tokens) if limit is not None]
        self._limit(min(limits, default=None))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def limited(self, max_prompt_tokens: int | None) -> PromptDataset:
        """The data set with all prompts held to a length, for a limit that is known later: longer ones are dropped where the
        configuration says so. Raises ValueError naming the first longer prompt otherwise, or where none would be left.
        """
        limited = copy.copy(self)
        limited._limit(max_prompt_tokens)
        return limited

    def _limit(self, max_prompt_tokens: int | None) -> None:
        if max_prompt_tokens is None:
            return
        keep = [i for i, row in enumerate(self._rows) if len(row["prompt_ids"]) <= max_prompt_tokens]
        dropped = len(self._rows) - len(keep)
        if dropped and not self._drop_long_prompts:
            first = next(i for i, row in enumerate(self._rows) if len(row["prompt_ids"]) > max_prompt_tokens)
            raise ValueError(
                f"the prompt of row {self._numbers[first]} has {len(self._rows[first]['prompt_ids'])} tokens, expected at most "
                f"{max_prompt_tokens} ({dropped} of {len(self._rows)} prompts are longer): raise max_prompt_tokens where the model's "
                "context allows it, or set drop_long_prompts to leave them out"
            )
        if not keep:
            raise ValueError(
                f"all {dropped} prompts are longer than {max_prompt_tokens} tokens: drop_long_prompts leaves none"
            )
        if dropped:
            logger.warning(
                "left out %d of %d prompts: longer than %d tokens", dropped, len(self._rows), max_prompt_tokens
            )
        self._rows, self._numbers = [self._rows[i] for i in keep], [self._numbers[i] for i in keep]


def load_prompts(
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig | None = None,
    max_prompt_tokens: int | None = None,
) -> PromptDataset:
    """Prompts from memory, a file or the hub.

    Args:
        source: list of texts or conversations; list of dicts; a `datasets.Dataset`; path of a JSON Lines, JSON, CSV (also gzipped) or
            Parquet file; hub name of a data set, with `:config` where it has several (`config.split` is read).
        tokenizer, config, max_prompt_tokens: as `PromptDataset` takes them.

    Files are read by `datasets`, which takes texts in JSON that look like dates for dates; nothing is left in its cache.

    Raises:
        ValueError, TypeError: as `PromptDataset`; a file that is missing or cannot be read, named.
        ImportError: a path or name needs the `datasets` package.
    """
    config = config or DataConfig()
    return PromptDataset(rows_of(source, config.split), tokenizer, config, max_prompt_tokens)


def load_train_and_eval(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int | None = None
) -> tuple[PromptDataset, PromptDataset | None]:
    """(prompts to train on, `eval_size` held-out prompts or None).

    The held-out rows are the first of `eval_path` or of the split `eval_split`, or, without either, the last of `path`, which are then not
    trained on.

    Raises what `load_prompts` raises; ValueError where `path` is empty or there are fewer rows than `eval_size` asks for.
    """
    if not config.path:
        raise ValueError("path is empty, expected a data file or a hub name")
    rows = rows_of(config.path, config.split)
    if not config.eval_size:
        return PromptDataset(rows, tokenizer, config, max_prompt_tokens), None
    train_rows, eval_rows, first = _hold_out(rows, config)
    train = PromptDataset(train_rows, tokenizer, config, max_prompt_tokens)
    return train, PromptDataset(eval_rows, tokenizer, config, max_prompt_tokens, first_row=first)


def _hold_out(rows: list[Row], config: DataConfig) -> tuple[list[Row], list[Row], int]:
    """Rows to train on, held-out rows, the number of the first of these in its source."""
    size = config.eval_size
    if config.eval_path is not None or config.eval_split is not None:
        source = config.path if config.eval_path is None else config.eval_path
        if config.eval_path is None and Path(source).expanduser().is_file():
            raise ValueError(
                f"eval_split is {config.eval_split!r}, but {source} is a file, which has no splits: set eval_path, or leave eval_split out"
            )
        held_out = rows_of(source, config.eval_split or config.split)
        if len(held_out) < size:
            raise ValueError(f"eval_size is {size}, expected at most {len(held_out)}, the number of rows in {source}")
        return rows, held_out[:size], 0
    if len(rows) <= size:
        raise ValueError(f"eval_size is {size}, expected less than {len(rows)}, the number of rows in {config.path}")
    return rows[:-size], rows[-size:], len(rows) - size


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[list[int]]:
    """A chat template writes the special tokens itself; an end of sequence that a tokenizer adds would end the prompt's answer."""
    try:
        encoded = tokenizer(texts, add_special_tokens=not chat, padding=False, truncation=False, verbose=False)[
            "input_ids"
        ]
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise ValueError(f"the tokenizer cannot encode the prompts: {error}") from error
    eos, eos_token = tokenizer.eos_token_id, tokenizer.eos_token
    if chat or eos is None:
        return encoded
    return [
        ids[:-1] if len(ids) > 1 and ids[-1] == eos and not text.endswith(eos_token) else ids
        for ids, text in zip(encoded, texts, strict=True)
    ]
