"""Loading models and tokenizers: from a folder or the hub, never running code of theirs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import torch
from huggingface_hub import constants as hub
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME


def load_model(name_or_path: str | Path, *, dtype: str | torch.dtype, device: str | torch.device) -> PreTrainedModel:
    """A causal language model from a folder in Transformers' format or from the hub; code in the repository is never run.

    dtype: a torch type or its name; "auto" is float32 on the CPU and bfloat16 on a GPU.
    Raises ValueError where there is no such model, it cannot be read, or it lacks some of its weights.
    """
    return _load(AutoModelForCausalLM, "model", name_or_path, dtype, device)


def load_reward_model(
    name_or_path: str | Path, *, dtype: str | torch.dtype, device: str | torch.device, new_head: bool = False
) -> PreTrainedModel:
    """A sequence-classification model with one label, as `load_model` loads one.

    new_head: for training: where the folder has no head of one label (a language model's has none), a random one is made.
    Raises ValueError as `load_model`, and without `new_head` for a model that has another number of labels than one.
    """
    if new_head:
        return _load(AutoModelForSequenceClassification, "model", name_or_path, dtype, device, num_labels=1)
    with _named_errors("reward model", _as_text(name_or_path)):
        labels = AutoConfig.from_pretrained(_as_text(name_or_path), trust_remote_code=False).num_labels
    if labels != 1:
        raise ValueError(
            f"reward model {_as_text(name_or_path)!r} has num_labels = {labels} (a classifier, or a language model without a reward head), expected "
            "1: a model that scores (fastppo reward-model trains one)"
        )
    return _load(AutoModelForSequenceClassification, "reward model", name_or_path, dtype, device)


def _load(
    auto_class: type,
    what: str,
    name_or_path: str | Path,
    dtype: str | torch.dtype,
    device: str | torch.device,
    num_labels: int | None = None,
) -> PreTrainedModel:
    """With `num_labels`, its head is new where it has another."""
    name_or_path = _as_text(name_or_path)
    device = torch.device(device)
    dtype = default_type(dtype, device)
    if not isinstance(getattr(torch, str(dtype).removeprefix("torch."), None), torch.dtype):
        raise ValueError(f"dtype is {dtype!r}, expected auto or the name of a torch type")
    with _named_errors(what, name_or_path):
        model, found = auto_class.from_pretrained(
            name_or_path,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused by name below
            **({} if num_labels is None else {"num_labels": num_labels}),
        )
    # Transformers puts random numbers in their place.
    lost = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
    if num_labels is not None:
        lost = {key for key in lost if key.startswith(f"{model.base_model_prefix}.")}
    if lost := sorted(lost):
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        raise ValueError(
            f"{what} {name_or_path!r} lacks weights, or has them in another shape: {', '.join(lost[:5])}{more}"
        )
    return model.to(device)


def default_type(dtype: str | torch.dtype, device: torch.device) -> str | torch.dtype:
    """Of weights that run on the device, where `dtype` is "auto"; else itself."""
    if dtype != "auto":
        return dtype
    return torch.float32 if device.type == "cpu" else torch.bfloat16


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


def load_tokenizer(name_or_path: str | Path, called: str = "tokenizer") -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name; ValueError where there is none.

    called: what the user knows the folder by, where that is more than a tokenizer's: "model", or a setting.
    """
    name_or_path = _as_text(name_or_path)
    with _named_errors(called, name_or_path, part="" if called == "tokenizer" else "the tokenizer of "):
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)


def load_named_tokenizer(name: str, tokenizer: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe: that of `model.tokenizer` where it is set, else that of `model.name`."""
    return load_tokenizer(tokenizer, "model.tokenizer") if tokenizer else load_tokenizer(name, "model.name")


def resolve_device(name: str) -> torch.device:
    """The device of a setting: `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`; ValueError for anything else, or without a GPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}, expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch sees no CUDA device here")
    return device


def _as_text(name_or_path: str | Path) -> str:
    return os.path.expanduser(os.fspath(name_or_path))


@contextmanager
def _named_errors(what: str, name_or_path: str, part: str = "") -> Iterator[None]:
    """part: which part of `what` is read inside."""
    if not name_or_path:
        raise ValueError(f"{what} is empty, expected a folder in Transformers' format or a hub name")
    looks_local = name_or_path.startswith((".", "/"))
    if looks_local and not Path(name_or_path).is_dir():
        raise ValueError(
            f"{what} is {name_or_path!r}, expected a folder in Transformers' format: there is no such folder"
        )
    try:
        _require_reachable(name_or_path)
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        where = "read from this folder" if Path(name_or_path).is_dir() else "found as a folder here or as a hub name"
        raise ValueError(f"{part}{what} {name_or_path!r} cannot be {where}: {error}") from error


def _require_reachable(name: str) -> None:
    """Raises OSError where a model is neither a folder nor in the hub's cache, and one question to the hub gets no answer: Transformers would
    repeat each of its own for half a minute at least. What the hub does answer, Transformers tells better."""
    if Path(name).is_dir() or Path(hub.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model")).exists():
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, CONFIG_NAME))
    except (HfHubHTTPError, OfflineModeIsEnabled):
        return
    except httpx.TransportError as error:
        raise OSError(f"there is no such folder, and the hub cannot be reached: {error}") from error
