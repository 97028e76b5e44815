"""Data sets of prompts: rows with their prompt's text and token ids, held to the lengths that fit, split into training and held-out."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastppo.data.sources import Row, check_rows, is_task, rows_of
from fastppo.data.writer import PromptWriter
from fastppo.recipe_config import DataConfig, EvalSetConfig

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
        config: `prompt_template`, `system_prompt`, `chat`, `rendered`, `max_prompt_tokens` and `drop_long_prompts` are read.
        first_row: number of the first row in its source, for messages.

    The columns `tools` and `chat_template_kwargs` of a row go to its chat template, unless `prompt_template` names them.

    Raises:
        ValueError: no rows, an empty or too long prompt, one that was rendered already, an unknown column or one that makes no prompt,
            messages that JSON cannot hold, settings that do not fit each other or the tokenizer.
        TypeError: rows that are no dicts.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        *,
        first_row: int = 0,
    ) -> None:
        columns = check_rows(rows)
        write = PromptWriter(tokenizer, config, columns)
        self._rows = [write({name: row.get(name) for name in columns}, first_row + i) for i, row in enumerate(rows)]
        write.finish()
        self._numbers = list(range(first_row, first_row + len(rows)))
        self.chat = write.chat
        """What rendered the prompts; None where no chat template did."""
        self._tokenizer, self._drop_long_prompts = tokenizer, config.drop_long_prompts
        self._limit(config.max_prompt_tokens)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def limited(self, max_prompt_tokens: int | None, vocab_size: int | None = None) -> PromptDataset:
        """The data set as a model can read it: longer prompts are dropped where the configuration says so.

        Args:
            max_prompt_tokens: longest prompt that the model's context has room for; None for no limit.
            vocab_size: rows of the model's embedding; None for any number.

        Raises:
            ValueError: a prompt is longer, named unless it is dropped; none is left; a prompt has a token that the model does not know.
        """
        limited = copy.copy(self)
        limited._limit(max_prompt_tokens)
        if vocab_size is not None:
            limited._check_ids(vocab_size)
        return limited

    def _check_ids(self, vocab_size: int) -> None:
        for number, row in zip(self._numbers, self._rows, strict=True):
            token = max(row["prompt_ids"])
            if token >= vocab_size:
                raise ValueError(
                    f"the prompt of row {number} has the token {self._tokenizer.convert_ids_to_tokens(token)!r} with id {token}, expected ids "
                    f"below {vocab_size}, the rows of the model's embedding (the tokenizer has {len(self._tokenizer)} tokens): take the "
                    "tokenizer that belongs to the model, or call model.resize_token_embeddings(len(tokenizer))"
                )

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


def load_prompts(source: Any, tokenizer: PreTrainedTokenizerBase, config: DataConfig | None = None) -> PromptDataset:
    """Prompts from memory, a file or the hub, as docs/data.md describes them; `PPOTrainer` takes the result as its prompts.

    Args:
        source: list of texts or conversations; list of dicts; a `datasets.Dataset`; path of a JSON Lines, JSON, CSV or TSV (these also
            gzipped) or Parquet file; hub name of a data set, with `:config` where it has several (`config.split` is read);
            `reasoning_gym:TASK` (`config.task_arguments` are read).
        tokenizer, config: as `PromptDataset` takes them; `config.columns` are turned into what they are declared as.

    Values of JSON, CSV and TSV files stay as they stand there: CSV has texts, JSON what JSON says. The others are read by `datasets`.

    Raises:
        ValueError, TypeError: as `PromptDataset`; a file that is missing or cannot be read, named with the line.
        ImportError: a Parquet file or hub name needs the `datasets` package, a task `reasoning-gym`.
    """
    config = config or DataConfig()
    return PromptDataset(rows_of(source, config), tokenizer, config)


def load_train_and_eval(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[PromptDataset, PromptDataset | dict[str, PromptDataset] | None]:
    """(prompts to train on, `eval_size` held-out prompts, or the `eval_sets` by their names, or None).

    The held-out rows are the first of `eval_path` or of the split `eval_split`, or, without either, the last of `path`, which are then not
    trained on.

    Raises what `load_prompts` raises; ValueError where `path` is empty or there are fewer rows than `eval_size` asks for.
    """
    if not config.path:
        raise ValueError("path is empty, expected a data file or a hub name")
    if (is_task(config.path) and (config.eval_path or config.eval_split)) or is_task(config.eval_path):
        raise ValueError(
            f"eval_path is {config.eval_path!r} and eval_split {config.eval_split!r}, expected neither with a task: the last eval_size of its "
            "problems, which differ from all others, are held out"
        )
    rows = rows_of(config.path, config)
    if config.eval_sets:
        sets = {name: PromptDataset(own, tokenizer, config) for name, own in eval_set_rows(config).items()}
        return PromptDataset(rows, tokenizer, config), sets
    if not config.eval_size:
        return PromptDataset(rows, tokenizer, config), None
    train_rows, eval_rows, first = hold_out(rows, config)
    train = PromptDataset(train_rows, tokenizer, config)
    return train, PromptDataset(eval_rows, tokenizer, config, first_row=first)


def eval_set_rows(config: DataConfig) -> dict[str, list[Row]]:
    """The rows of each of `eval_sets`. Raises ValueError naming one that cannot be had, or that would be trained on."""
    return {name: _rows_of_set(name, chosen, config) for name, chosen in config.eval_sets.items()}


def _rows_of_set(name: str, chosen: EvalSetConfig, config: DataConfig) -> list[Row]:
    where, source = f"eval_sets.{name}", chosen.path or config.path
    if is_task(source):
        raise ValueError(
            f"{where}.path is {source!r}, expected no task: its problems would be those that are trained on"
        )
    if chosen.path is None and chosen.split in (None, config.split):
        raise ValueError(f"{where} has neither a path nor a split of its own, expected other rows than those of path")
    if chosen.split is not None and Path(source).expanduser().is_file():
        raise ValueError(f"{where}.split is {chosen.split!r}, but {source} is a file, which has no splits")
    rows = rows_of(source, dataclasses.replace(config, task_arguments={}), chosen.split)
    if chosen.size is not None and len(rows) < chosen.size:
        raise ValueError(f"{where}.size is {chosen.size}, expected at most {len(rows)}, the number of rows in {source}")
    return rows[: chosen.size]


def hold_out(rows: list[Row], config: DataConfig) -> tuple[list[Row], list[Row], int]:
    """Rows to train on, held-out rows, the number of the first of these in its source."""
    size = config.eval_size
    if config.eval_path is not None or config.eval_split is not None:
        source = config.path if config.eval_path is None else config.eval_path
        if config.eval_path is None and Path(source).expanduser().is_file():
            raise ValueError(
                f"eval_split is {config.eval_split!r}, but {source} is a file, which has no splits: set eval_path, or leave eval_split out"
            )
        held_out = rows_of(source, config, config.eval_split)
        if len(held_out) < size:
            raise ValueError(f"eval_size is {size}, expected at most {len(held_out)}, the number of rows in {source}")
        return rows, held_out[:size], 0
    if len(rows) <= size:
        raise ValueError(f"eval_size is {size}, expected less than {len(rows)}, the number of rows in {config.path}")
    return rows[:-size], rows[-size:], len(rows) - size
