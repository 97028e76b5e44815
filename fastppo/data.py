"""Prompts: files, hub data sets and lists become rows with token ids; a sampler deals them out."""

from __future__ import annotations

import difflib
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fastppo.config import DataConfig

# Ending (without .gz) -> loader of the `datasets` library.
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}

Row = dict[str, Any]


class PromptDataset(Sequence[Row]):
    """Rows with their own columns, `prompt` (the text, or the messages of a conversation) and `prompt_ids` (token ids)."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


def load_prompts(
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig | None = None,
    max_prompt_tokens: int | None = None,
) -> PromptDataset:
    """Prompts from a list of strings, a list of rows with a "prompt", a `datasets.Dataset`, or a file or hub name.

    A prompt is a text, or a conversation (a list of {"role", "content"}), which goes through the tokenizer's chat template.
    max_prompt_tokens: the longest prompt that may be used; longer ones raise, or are left out with `config.drop_long_prompts`.

    Raises:
        ValueError: nothing in it, an empty prompt, a prompt that is too long (named by its row), an unknown column or format.
        TypeError: a source or a row of another type. FileNotFoundError: no such file. ImportError: `datasets` is missing.
    """
    config = config or DataConfig()
    rows = _rows(source, config)
    if not rows:
        raise ValueError("the data set is empty, expected at least one prompt")
    limits = [limit for limit in (max_prompt_tokens, config.max_prompt_tokens) if limit is not None]
    return PromptDataset(_encode_all(rows, tokenizer, config, min(limits, default=None)))


def load_train_and_eval(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int | None = None
) -> tuple[PromptDataset, PromptDataset | None]:
    """Training and held-out prompts as `config` says: `eval_size` rows of `eval_path`, or else off the end of `path`."""
    rows = _rows(config.path, config)
    held_out: list[Row] = []
    if config.eval_size and config.eval_path is not None:
        held_out = _rows(config.eval_path, config)[: config.eval_size]
    elif config.eval_size:
        if config.eval_size >= len(rows):
            raise ValueError(
                f"data.eval_size is {config.eval_size}, expected less than the {len(rows)} rows of {config.path}"
            )
        rows, held_out = rows[: -config.eval_size], rows[-config.eval_size :]
    train = load_prompts(rows, tokenizer, config, max_prompt_tokens)
    return train, load_prompts(held_out, tokenizer, config, max_prompt_tokens) if held_out else None


def _rows(source: Any, config: DataConfig) -> list[Row]:
    if isinstance(source, str | Path):
        return [dict(row) for row in _read(str(source), config.split)]
    if not isinstance(source, Sequence) and not hasattr(source, "__getitem__"):
        raise TypeError(
            f"the data set is {type(source).__name__}, expected a list, a datasets.Dataset, a file or a hub name"
        )
    rows = []
    for index in range(len(source)):
        row = source[index]
        if isinstance(row, str):
            row = {"prompt": row}
        if not isinstance(row, Mapping):
            raise TypeError(f"row {index} is {row!r}, expected a string or a mapping with a 'prompt'")
        rows.append(dict(row))
    return rows


def _read(name: str, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("reading data files needs the datasets library: pip install fastppo[data]") from error
    path = Path(name)
    ending = Path(name.removesuffix(".gz")).suffix
    if not path.exists():
        if ending in FORMATS or name.startswith((".", "/", "~")):
            raise FileNotFoundError(f"data file {name} does not exist")
        return datasets.load_dataset(name, split=split)
    if ending not in FORMATS:
        raise ValueError(f"data file {name} ends in {ending!r}, expected {', '.join(FORMATS)}, each also with .gz")
    try:
        return datasets.load_dataset(FORMATS[ending], data_files=str(path.resolve()), split="train")
    except Exception as error:  # the library has a class of its own for each format's trouble
        raise ValueError(f"data file {name} cannot be read: {error.__cause__ or error}") from error


def _encode_all(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, config: DataConfig, limit: int | None
) -> list[Row]:
    encoded, dropped = [], 0
    for index, row in enumerate(rows):
        prompt, ids = _encode(index, row, tokenizer, config)
        if limit is not None and len(ids) > limit:
            if not config.drop_long_prompts:
                raise ValueError(
                    f"row {index} has a prompt of {len(ids)} tokens, expected at most {limit}; "
                    "shorten it, or leave such rows out with data.drop_long_prompts=true"
                )
            dropped += 1
            continue
        encoded.append(row | {"prompt": prompt, "prompt_ids": ids})
    if not encoded:
        raise ValueError(f"all {dropped} prompts are longer than {limit} tokens")
    if dropped:
        print(f"data: left out {dropped} of {len(rows)} prompts that are longer than {limit} tokens")
    return encoded


def _encode(index: int, row: Row, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> tuple[Any, list[int]]:
    """(prompt as shown to rewards, token ids) of one row."""
    prompt = row.get("prompt")
    if not isinstance(prompt, list):
        prompt = _fill_template(index, row, config.prompt_template)
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise ValueError(f"row {index} has an empty prompt")
    has_template = getattr(tokenizer, "chat_template", None) is not None
    wants_chat = isinstance(prompt, list) or config.chat or (config.chat is None and has_template)
    if not wants_chat:
        return prompt, tokenizer(prompt)["input_ids"]
    if not has_template:
        raise ValueError(f"row {index} is a conversation (or data.chat is set), but the tokenizer has no chat template")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if config.system_prompt is not None:
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    # Rendered first: the template writes the special tokens itself, and the tokenizer must not add them again.
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return prompt, tokenizer(text, add_special_tokens=False)["input_ids"]


def _fill_template(index: int, row: Row, template: str) -> str:
    """`template` with {column} replaced by the row's values; nothing but plain column names is understood."""
    parts = []
    for literal, name, form, conversion in string.Formatter().parse(template):
        parts.append(literal)
        if name is None:
            continue
        if not name.isidentifier() or form or conversion:
            raise ValueError(f"data.prompt_template holds {{{name}}}, expected plain column names such as {{question}}")
        if name not in row:
            near = difflib.get_close_matches(name, list(row), n=1)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise ValueError(f"row {index} has no column {name!r}, only {', '.join(map(repr, row))}{hint}")
        if not isinstance(row[name], str):
            raise TypeError(f"row {index}: column {name!r} is {row[name]!r}, expected a string")
        parts.append(row[name])
    return "".join(parts)


class PromptSampler:
    """Deals out indices of a data set, each once an epoch, in an order that depends on (seed, epoch) alone."""

    def __init__(self, size: int, batch: int, seed: int) -> None:
        self.size, self.batch, self.seed = size, batch, seed
        self.epoch, self.cursor = 0, 0

    def next(self) -> list[int]:
        """The next `batch` indices; a batch that reaches the end of an epoch goes on in the next one."""
        indices: list[int] = []
        while len(indices) < self.batch:
            order = self._order()
            taken = order[self.cursor : self.cursor + self.batch - len(indices)]
            indices += taken
            self.cursor += len(taken)
            if self.cursor == self.size:
                self.epoch, self.cursor = self.epoch + 1, 0
        return indices

    def _order(self) -> list[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        return torch.randperm(self.size, generator=generator).tolist()

    def state_dict(self) -> dict[str, int]:
        return {"size": self.size, "epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken. Raises ValueError when the data set has another size: it would deal out other prompts."""
        if state["size"] != self.size:
            raise ValueError(
                f"the checkpoint was trained on {state['size']} prompts, expected {self.size} as given now"
            )
        self.epoch, self.cursor = state["epoch"], state["cursor"]
