"""Loading models and tokenizers: from a folder or the hub, never running code of theirs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


def load_model(name_or_path: str | Path, *, dtype: str | torch.dtype, device: str | torch.device) -> PreTrainedModel:
    """A causal language model from a folder in Transformers' format or from the hub; code in the repository is never run.

    dtype: a torch type or its name; "auto" is float32 on the CPU and bfloat16 on a GPU.
    Raises ValueError where there is no such model, it cannot be read, or it lacks some of its weights.
    """
    name_or_path = _as_text(name_or_path)
    device = torch.device(device)
    if dtype == "auto":
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if not isinstance(getattr(torch, str(dtype).removeprefix("torch."), None), torch.dtype):
        raise ValueError(f"dtype is {dtype!r}, expected auto or the name of a torch type")
    with _named_errors("model", name_or_path):
        model, found = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused by name below
        )
    # Transformers puts random numbers in their place.
    if lost := sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}):
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        raise ValueError(
            f"model {name_or_path!r} lacks weights, or has them in another shape: {', '.join(lost[:5])}{more}"
        )
    return model.to(device)


def load_outline(name_or_path: str | Path) -> PreTrainedModel:
    """The model with its configurations and the shapes of its weights alone, which are neither read nor downloaded (they are on "meta").

    Raises ValueError where there is no such model.
    """
    name_or_path = _as_text(name_or_path)
    with _named_errors("model", name_or_path):
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        with suppress(OSError):  # not every model has one
            model.generation_config = GenerationConfig.from_pretrained(name_or_path)
    return model


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name; ValueError where there is none."""
    name_or_path = _as_text(name_or_path)
    with _named_errors("tokenizer", name_or_path):
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)


def _as_text(name_or_path: str | Path) -> str:
    return os.path.expanduser(os.fspath(name_or_path))


@contextmanager
def _named_errors(what: str, name_or_path: str) -> Iterator[None]:
    looks_local = name_or_path.startswith((".", "/"))
    if looks_local and not Path(name_or_path).is_dir():
        raise ValueError(
            f"{what} is {name_or_path!r}, expected a folder in Transformers' format: there is no such folder"
        )
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        where = "read from this folder" if Path(name_or_path).is_dir() else "found as a folder here or as a hub name"
        raise ValueError(f"{what} {name_or_path!r} cannot be {where}: {error}") from error
