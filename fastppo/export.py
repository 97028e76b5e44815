"""The policy of a checkpoint as a folder in Transformers' format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from fastppo.checkpoint import list_checkpoints, load_checkpoint, load_latest_checkpoint
from fastppo.errors import CheckpointError
from fastppo.model import load_model, load_named_tokenizer
from fastppo.model.adapters import Adapters
from fastppo.model.writing import write_model
from fastppo.roles import weights_sha256
from fastppo.run_folder import ADAPTER, BEST, CHECKPOINTS, MODEL, read_settings, require_writable_folder


def export_run(
    run: str | Path,
    folder: str | Path | None = None,
    *,
    step: int | None = None,
    best: bool = False,
    model: str | Path | None = None,
    adapter: bool = False,
) -> Path:
    """Write the policy and the tokenizer of a run's newest checkpoint, of the one of `step`, or of the best step, and return where. LoRA
    adapters are merged.

    folder: new or empty; by default in the run folder `model`, `model-step-000120` where a step is chosen, or `best`.
    best: of the step that the newest checkpoint names as the best so far; the run has to have `evaluation.keep_best`.
    adapter: write the LoRA adapter alone, in peft's format, by default to `adapter`, or `adapter-step-000120` where a step is chosen.
    model: which model the run started from, for its architecture and tokenizer; by default the one that its config.yaml names.
    Raises ValueError or CheckpointError naming what is missing.
    """
    run = Path(run).expanduser()
    path, policy, identity = _best_policy(run, step) if best else _policy(run, step)
    lora = identity.get("lora")
    if adapter and lora is None:
        raise ValueError(f"adapter is True, expected False: {run} trained all weights")
    settings = _model_settings(run)
    name = model or first_model(run)
    if not name:
        raise ValueError(f"{run} does not say which model it started from: name it (--model)")
    if folder is None:
        kind = ADAPTER if adapter else BEST if best else MODEL
        chosen = step is not None or (adapter and best)
        folder = run / (f"{kind}-{path.name}" if chosen else kind)
    elif (folder := Path(folder).expanduser()).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder is {str(folder)!r}, which is not empty, expected a new or an empty one")
    require_writable_folder(folder, "folder")
    tokenizer = load_named_tokenizer(str(name), None if model else settings.get("tokenizer"))
    dtype = identity.get("model.dtype") or next(iter(policy.values())).dtype  # sharded weights are kept in a wider type
    trained = load_model(name, dtype=dtype, device="cpu")
    adapters = None if lora is None else policy_adapters_on(trained, path, identity)
    try:
        (trained if adapters is None else adapters.trained("policy")).load_state_dict(policy)
    except RuntimeError as error:
        raise CheckpointError(f"{path} holds the weights of another model than {name}: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    if adapter:
        adapters.save(folder)
    else:
        merged = {} if adapters is None else {"state_dict": adapters.merged_state()}
        write_model(trained, tokenizer, folder, **merged)
    return folder


def first_model(run: Path) -> str | None:
    """Folder or hub name of the model that a run started from; None where its config.yaml names none."""
    return _model_settings(run).get("name") or None


def _model_settings(run: Path) -> dict[str, Any]:
    """Empty where its config.yaml says nothing of them."""
    found = (read_settings(run) or {}).get("model")
    return found if isinstance(found, dict) else {}


def adapters_on(base: PreTrainedModel, checkpoint: Path, identity: dict[str, Any]) -> Adapters:
    """An adapter on the model that a run with LoRA started from, in as many bits as there, for the numbers of one of the checkpoint's. Raises
    CheckpointError where `base` is another model."""
    if weights_sha256(base.named_parameters()) != identity["base_sha256"]:
        raise CheckpointError(f"{checkpoint} holds an adapter of another model than {base.name_or_path}")
    adapters = Adapters.from_description(base, identity["lora"])
    if identity.get("lora.quantization"):
        adapters.quantize_base()
    return adapters


def policy_adapters_on(base: PreTrainedModel, checkpoint: Path, identity: dict[str, Any]) -> Adapters:
    """As `adapters_on`, with those of a debate's seats, where each has its own: a checkpoint has them all among the policy's numbers."""
    adapters = adapters_on(base, checkpoint, identity)
    if seats := dict(identity.get("lora.seats", ())):
        adapters.add_seats(seats, next(seat for seat, role in seats.items() if role == "policy"))
    return adapters


def _best_policy(run: Path, step: int | None) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """As `_policy`."""
    if step is not None:
        raise ValueError(f"step is {step} and best is True, expected one of them")
    newest = load_latest_checkpoint(run / CHECKPOINTS)
    best = None if newest is None else newest[1][1].get("best", {}).get("step")
    if best not in list_checkpoints(run / CHECKPOINTS):
        raise ValueError(f"{run} has no checkpoint of its best step, expected a run with evaluation.keep_best")
    return _policy(run, best)


def _policy(run: Path, step: int | None) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """(checkpoint, the policy's weights or adapter, what the checkpoint is bound to)"""
    root = run / CHECKPOINTS
    checkpoints = list_checkpoints(root)
    if not checkpoints:
        raise ValueError(f"{run} has no checkpoints, expected a run folder with some")
    if step is None:
        path, (tensors, state, _) = load_latest_checkpoint(root)
    elif step in checkpoints:
        path = checkpoints[step]
        tensors, state, _ = load_checkpoint(path)
    else:
        raise ValueError(f"step is {step}, expected one that has a checkpoint: {', '.join(map(str, checkpoints))}")
    return path, tensors["policy"], state.get("identity", {})
