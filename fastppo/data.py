"""Prompts: reading data sets, making prompt texts and token ids of their rows, drawing them in a reproducible order.

A prompt is a text, or a conversation: a list of messages `{"role": ..., "content": ...}`.
"""

from __future__ import annotations

import copy
import difflib
import glob
import logging
import random
import re
import string
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastppo.config import DataConfig
from fastppo.rewards.function import OWN_ARGUMENTS

Row = dict[str, Any]

FORMATS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
HUB_NAME = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?")
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
        columns = _check_rows(rows)
        chat = _use_chat_template(tokenizer, config)
        write = _PromptWriter(tokenizer, config, chat, columns)
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
    return PromptDataset(_rows_of(source, config.split), tokenizer, config, max_prompt_tokens)


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
    rows = _rows_of(config.path, config.split)
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
        held_out = _rows_of(source, config.eval_split or config.split)
        if len(held_out) < size:
            raise ValueError(f"eval_size is {size}, expected at most {len(held_out)}, the number of rows in {source}")
        return rows, held_out[:size], 0
    if len(rows) <= size:
        raise ValueError(f"eval_size is {size}, expected less than {len(rows)}, the number of rows in {config.path}")
    return rows[:-size], rows[-size:], len(rows) - size


class PromptSampler:
    """Draws batches of indices into a data set: all of them once, in random order, then all again in another one.

    The order depends on the seed and the epoch only. A batch runs over an epoch's end into the next one, so every batch is full.
    """

    def __init__(self, dataset_len: int, batch: int, seed: int) -> None:
        for name, value, least in (("dataset_len", dataset_len, 1), ("batch", batch, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}, expected an integer >= {least}")
        self._dataset_len, self._batch, self._seed = dataset_len, batch, seed
        self._epoch = self._cursor = 0
        self._order = self._shuffled()

    def next(self) -> list[int]:
        """The next `batch` indices."""
        indices: list[int] = []
        while len(indices) < self._batch:
            if self._cursor == self._dataset_len:
                self._epoch, self._cursor = self._epoch + 1, 0
                self._order = self._shuffled()
            taken = self._order[self._cursor : self._cursor + self._batch - len(indices)]
            indices += taken
            self._cursor += len(taken)
        return indices

    def state_dict(self) -> dict[str, int]:
        """Where the sampler stands, as plain JSON."""
        return {"epoch": self._epoch, "cursor": self._cursor, "dataset_len": self._dataset_len, "seed": self._seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from `state`, also with another batch size. ValueError where it belongs to another data set or seed."""
        for name, mine in (("dataset_len", self._dataset_len), ("seed", self._seed)):
            if state[name] != mine:
                raise ValueError(f"the saved prompt order has {name} {state[name]}, expected {mine} as in this run")
        self._epoch, self._cursor = int(state["epoch"]), int(state["cursor"])
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        order = list(range(self._dataset_len))
        random.Random(f"{self._seed}:{self._epoch}").shuffle(order)
        return order


# From rows to prompts


class _PromptWriter:
    """Adds `prompt` to rows and collects the texts to tokenize."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig, chat: bool, columns: list[str]) -> None:
        self._tokenizer, self._chat, self._system_prompt = tokenizer, chat, config.system_prompt
        self._pieces = _parse_template(config.prompt_template, columns)
        self.texts: list[str] = []
        self._first_of_kind: dict[str, int] = {}

    def __call__(self, row: Row, number: int) -> Row:
        only = self._pieces[0][1] if len(self._pieces) == 1 and not self._pieces[0][0] else None
        conversation = only is not None and isinstance(row[only], list)
        self._first_of_kind.setdefault("a conversation" if conversation else "a text", number)
        if conversation:
            messages = _check_messages(row[only], number)
            self.texts.append(self._render(messages, number))
            return row | {"prompt": messages}
        text = "".join(literal + _field(row, column, number) for literal, column in self._pieces)
        if not text.strip():
            raise ValueError(f"the prompt of row {number} is empty: {text!r}")
        self.texts.append(self._render([{"role": "user", "content": text}], number) if self._chat else text)
        return row | {"prompt": text}

    def require_one_kind(self) -> None:
        """Reward functions take all prompts as texts or all as conversations."""
        if len(self._first_of_kind) > 1:
            found = " and ".join(f"{kind} (row {number})" for kind, number in self._first_of_kind.items())
            raise ValueError(f"the prompts are of two kinds, {found}: expected all texts or all conversations")

    def _render(self, messages: list[Row], number: int) -> str:
        if not self._chat:
            raise ValueError(
                f"the prompt of row {number} is a conversation, expected a text because "
                + ("chat is off" if self._tokenizer.chat_template else "the tokenizer has no chat template")
            )
        if self._system_prompt is not None and messages[0]["role"] == "system":
            raise ValueError(
                f"system_prompt is set, but the conversation of row {number} begins with a system message of its own"
            )
        system = [] if self._system_prompt is None else [{"role": "system", "content": self._system_prompt}]
        try:
            return self._tokenizer.apply_chat_template(system + messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program that raises what it likes
            raise ValueError(f"the tokenizer's chat template refuses the prompt of row {number}: {error}") from error


def _use_chat_template(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> bool:
    available = bool(getattr(tokenizer, "chat_template", None))
    if config.chat and not available:
        raise ValueError("chat is true, but the tokenizer has no chat template")
    chat = available if config.chat is None else config.chat
    if config.system_prompt is not None and not chat:
        raise ValueError("system_prompt is set, but no chat template is applied that would have a place for it")
    return chat


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


def _parse_template(template: str, columns: list[str]) -> list[tuple[str, str | None]]:
    """[(literal text, column that follows it or None)]; only plain `{column}` fields of known columns pass."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"prompt_template is {template!r}: {error} (a brace that stands for itself is doubled)"
        ) from error
    for _, column, options, conversion in parts:
        if column is not None and (options or conversion or not column):
            raise ValueError(
                f"prompt_template is {template!r}, expected plain fields such as {{prompt}}, without options"
            )
        if column is not None and column not in columns:
            close = difflib.get_close_matches(column, columns, n=1)
            hint = f" (did you mean {{{close[0]}}}?)" if close else ""
            raise ValueError(
                f"prompt_template names the column {column!r}{hint}, expected one of the data's: {', '.join(map(repr, columns))}"
            )
    return [(literal, column) for literal, column, _, _ in parts]


def _field(row: Row, column: str | None, number: int) -> str:
    value = "" if column is None else row[column]
    if isinstance(value, str | int | float):
        return str(value)
    raise ValueError(f"column {column!r} of row {number} is {type(value).__name__}, expected a text or a number")


def _check_messages(messages: list[Any], number: int) -> list[Row]:
    """The messages without the empty entries that tables fill in."""
    if not messages:
        raise ValueError(f"the prompt of row {number} is a conversation without messages")
    for message in messages:
        fits = isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not fits:
            raise ValueError(
                f"the prompt of row {number} has the message {message!r}, expected a dict with texts 'role' and 'content'"
            )
    if messages[-1]["role"] == "assistant":
        raise ValueError(
            f"the conversation of row {number} ends with the assistant's turn, expected one for it to answer"
        )
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


# From sources to rows


def _rows_of(source: Any, split: str) -> list[Row]:
    if isinstance(source, str | Path):
        return _read(str(source), split)
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(source, datasets.Dataset):
        return source.to_list()
    if isinstance(source, Mapping) or not isinstance(source, Sequence):
        raise TypeError(
            f"prompts are {type(source).__name__}, expected a list of texts, conversations or dicts, a datasets.Dataset, a path or a "
            "hub name"
        )
    return [{"prompt": item} if isinstance(item, str | list) else item for item in source]


def _check_rows(rows: Sequence[Row]) -> list[str]:
    """The names of all columns, in the order in which they appear."""
    if not rows:
        raise ValueError("the data set is empty, expected at least one row")
    columns: dict[str, None] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping) or not all(isinstance(name, str) for name in row):
            raise TypeError(
                f"row {number} is {type(row).__name__}, expected a text, a conversation or a dict with names of columns"
            )
        columns |= dict.fromkeys(row)
    for name in ("prompt_ids", *OWN_ARGUMENTS):
        if name in columns:
            raise ValueError(
                f"the data has a column {name!r}, a name that fastppo gives away itself: rename or remove it"
            )
    return list(columns)


def _read(source: str, split: str) -> list[Row]:
    path = Path(source).expanduser()
    if path.is_dir():
        raise ValueError(f"{source} is a folder, expected a file: {', '.join(FORMATS)}, also with .gz")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = FORMATS.get(next((suffix for suffix in reversed(suffixes) if suffix != ".gz"), ""))
    if path.is_file():
        return _read_file(path, kind)
    hub = HUB_NAME.fullmatch(source)
    if kind or hub is None or source.startswith("."):
        raise ValueError(f"there is no file {source} (looked for {path.absolute()})")
    return _read_hub(hub["name"], hub["config"], split)


def _read_file(path: Path, kind: str | None) -> list[Row]:
    if kind is None or (kind == "parquet" and path.suffix.lower() == ".gz"):
        raise ValueError(
            f"{path} has an unknown format, expected one of {', '.join(FORMATS)}, also with .gz except Parquet"
        )
    datasets = _datasets()
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        # A cache of its own, gone at once: otherwise a copy of every file stays in the user's home.
        with tempfile.TemporaryDirectory() as cache:
            files = [glob.escape(str(path.absolute()))]
            loaded = datasets.load_dataset(kind, data_files=files, split="train", cache_dir=cache, keep_in_memory=True)
            return loaded.to_list()
    except StopIteration:  # what it says of an empty file
        return []
    except (ValueError, OSError, EOFError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{path} cannot be read as {kind}: {error.__cause__ or error}") from error
    finally:
        if bars:
            datasets.enable_progress_bars()


def _read_hub(name: str, config: str | None, split: str) -> list[Row]:
    datasets = _datasets()
    try:
        return datasets.load_dataset(name, config, split=split).to_list()
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{name} is no file here and cannot be read as a data set of the hub: {error}") from error


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("reading data sets needs the datasets package: pip install fastppo[data]") from error
    return datasets
