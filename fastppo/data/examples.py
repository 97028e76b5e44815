"""Data sets of examples that a model is to imitate: tokens with a mask, held to the lengths that fit, split into training and held-out."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastppo.data.example_writer import Example, ExampleWriter
from fastppo.data.prompts import eval_set_rows, hold_out
from fastppo.data.sources import Row, check_rows, rows_of
from fastppo.sft_config import ExamplesConfig

logger = logging.getLogger(__name__)


class ExampleDataset:
    """The examples of a data set, in its order; `dataset[i]` is an `Example`.

    Args:
        rows: dicts with `prompt` and `completion` (texts, or conversations: lists of messages), or with `messages`; other columns can be named
            by `config.prompt_template` and `config.completion_template`.
        tokenizer: makes the ids, those of a prompt as `PromptDataset` does; its chat template serves conversations, and texts too unless
            `config.chat` says otherwise.
        first_row: number of the first row in its source, for messages.

    A completion ends with the token that ends the assistant's turn in the chat template, else with the end of sequence. Of a conversation in
    `messages` all of the assistant's turns are imitated, of a `completion` those in it.

    Raises:
        ValueError: as `PromptDataset`; a row without a completion, an empty one, one that holds an end of sequence before its own; a tokenizer
            that has none; an example longer than `config.max_tokens`.
        TypeError: rows that are no dicts.
    """

    def __init__(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: ExamplesConfig, *, first_row: int = 0
    ) -> None:
        columns = check_rows(rows)
        write = ExampleWriter(tokenizer, config, columns)
        self._examples = [
            example
            for number, row in enumerate(rows, start=first_row)
            for example in write({name: row.get(name) for name in columns}, number)
        ]
        write.finish()
        self._tokenizer, self._drop_long_rows = tokenizer, config.drop_long_rows
        self._limit(config.max_tokens)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self._examples)

    def limited(self, max_tokens: int | None, vocab_size: int) -> ExampleDataset:
        """The data set as a model can read it: longer examples are dropped where the configuration says so.

        Args:
            max_tokens: longest example that the model's context has room for; None for no limit.
            vocab_size: rows of the model's embedding.

        Raises:
            ValueError: an example is longer, named unless it is dropped; none is left; one has a token that the model does not know.
        """
        limited = copy.copy(self)
        limited._limit(max_tokens)
        for example in limited:
            if (token := max(example.tokens)) >= vocab_size:
                raise ValueError(
                    f"row {example.row} has the token {self._tokenizer.convert_ids_to_tokens(token)!r} with id {token}, expected ids below "
                    f"{vocab_size}, the rows of the model's embedding (the tokenizer has {len(self._tokenizer)} tokens): take the tokenizer "
                    "that belongs to the model, or call model.resize_token_embeddings(len(tokenizer))"
                )
        return limited

    def _limit(self, max_tokens: int | None) -> None:
        if max_tokens is None:
            return
        kept = [example for example in self._examples if len(example.tokens) <= max_tokens]
        dropped, count = len(self._examples) - len(kept), len(self._examples)
        if dropped and not self._drop_long_rows:
            first = next(example for example in self._examples if len(example.tokens) > max_tokens)
            raise ValueError(
                f"row {first.row} has {len(first.tokens)} tokens with its completion, expected at most {max_tokens} ({dropped} of {count} "
                "examples are longer): raise max_tokens where the model's context allows it, or set drop_long_rows to leave them out"
            )
        if not kept:
            raise ValueError(f"all {count} examples are longer than {max_tokens} tokens: drop_long_rows leaves none")
        if dropped:
            logger.warning("left out %d of %d examples: longer than %d tokens", dropped, count, max_tokens)
        self._examples = kept


def load_examples(
    source: Any, tokenizer: PreTrainedTokenizerBase, config: ExamplesConfig | None = None
) -> ExampleDataset:
    """Examples from memory, a file or the hub, as docs/sft.md describes them; `SFTTrainer` takes the result as its examples.

    source: list of dicts; a `datasets.Dataset`; a file or hub name, as `load_prompts` takes them.

    Raises what `ExampleDataset` and, of files, `load_prompts` raise.
    """
    config = config or ExamplesConfig()
    return ExampleDataset(rows_of(source, config.prompts()), tokenizer, config)


def load_train_and_eval_examples(
    config: ExamplesConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[ExampleDataset, ExampleDataset | dict[str, ExampleDataset] | None]:
    """(examples to train on, those of `eval_size` held-out rows, or of the `eval_sets` by their names, or None).

    The held-out rows are the first of `eval_path` or of the split `eval_split`, or, without either, the last of `path`, which are then not
    trained on. Raises what `load_examples` raises; ValueError where `path` is empty or there are fewer rows than `eval_size` asks for.
    """
    if not config.path:
        raise ValueError("path is empty, expected a data file or a hub name")
    rows = rows_of(config.path, config.prompts())
    if config.eval_sets:
        sets = {name: ExampleDataset(own, tokenizer, config) for name, own in eval_set_rows(config.prompts()).items()}
        return ExampleDataset(rows, tokenizer, config), sets
    if not config.eval_size:
        return ExampleDataset(rows, tokenizer, config), None
    train, held_out, first = hold_out(rows, config.prompts())
    return ExampleDataset(train, tokenizer, config), ExampleDataset(held_out, tokenizer, config, first_row=first)
