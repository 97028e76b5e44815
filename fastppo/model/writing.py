"""Writing a trained model in Transformers' format, and finding before the training what would be refused after it."""

from __future__ import annotations

import errno
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils import logging as transformers_logging


def write_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path, **options: object
) -> None:
    """Model and tokenizer in a folder that `from_pretrained` reads; options are those of the model's `save_pretrained`.

    The generation config is written as it came, also where Transformers reads it with a warning and refuses to write it
    (`odd_generation_config`).
    """
    with _no_progress_bar():
        if odd_generation_config(model) is None:
            model.save_pretrained(path, **options)
        else:
            with _plain_generation_config(model) as odd:
                model.save_pretrained(path, **options)
            odd.to_json_file(Path(path) / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"])
    tokenizer.save_pretrained(path)


def odd_generation_config(model: PreTrainedModel) -> str | None:
    """Why Transformers would refuse to save the model's generation config, in one line; None where it would not."""
    if not model.can_generate():
        return None
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())
    return None


def require_writable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError with the reason where `write_model` would fail, or what it writes could not be read.

    All but the weights is written to a temporary folder and read again. Each tensor of the weights is stood in for by a tiny one. Raises
    OSError where that folder has no room for it, which says nothing about the model.
    """
    if getattr(model, "hf_quantizer", None) is not None and not getattr(model, "_hf_peft_config_loaded", False):
        method = getattr(model.hf_quantizer.quantization_config, "quant_method", "unknown")
        raise ValueError(
            f"the weights of {type(model).__name__} are quantised ({getattr(method, 'value', method)}), expected plain ones, all of which can "
            "be trained and written: load it without quantization, or call model.dequantize() and save and load it"
        )
    with tempfile.TemporaryDirectory() as folder:
        try:
            write_model(model, tokenizer, folder, state_dict=_stand_ins(model), save_original_format=False)
            if model.can_generate():
                GenerationConfig.from_pretrained(folder)
        except Exception as error:  # whatever Transformers, safetensors or a tokenizer may raise
            reason = " ".join(str(error).split())
            if _disk_is_full(error):
                raise OSError(
                    f"there is no room for a model's configuration and tokenizer in the temporary folder {tempfile.gettempdir()}: "
                    f"let the environment variable TMPDIR name another ({reason})"
                ) from error
            raise ValueError(
                f"{type(model).__name__} could not be written after its training: {type(error).__name__}: {reason}"
            ) from error


def _disk_is_full(error: Exception) -> bool:
    """Or the user's share of it; libraries written in Rust say it in their text alone."""
    return any(
        getattr(error, "errno", None) == number or f"os error {number}" in str(error)
        for number in (errno.ENOSPC, errno.EDQUOT)
    )


@contextmanager
def _plain_generation_config(model: PreTrainedModel) -> Iterator[GenerationConfig]:
    """Inside the block the model has one that Transformers does not refuse; gives the model's own."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield own
    finally:
        model.generation_config = own


def _stand_ins(model: PreTrainedModel) -> dict[str, object]:
    """The model's state in a few bytes: tensors that share memory stand for those that do, which is what Transformers may refuse."""
    state, storages = model.state_dict(), defaultdict(list)
    for name, value in state.items():
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()].append(name)
    for names in storages.values():
        spans = {name: _span(state[name]) for name in names}
        marks = sorted({mark for span in spans.values() for mark in span})
        memory = torch.zeros(len(marks), dtype=torch.uint8, device="cpu")
        for name, (begin, end) in spans.items():
            state[name] = memory[marks.index(begin) : marks.index(end)]
    return state


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses where its memory begins and ends."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size() if tensor.numel() else begin


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Transformers draws a bar for each file it writes, across the run's own display."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
