"""The policy of a checkpoint as a folder in Transformers' format."""

from __future__ import annotations

from pathlib import Path

from fastppo.checkpoint import list_checkpoints, load_checkpoint, load_latest_checkpoint
from fastppo.errors import CheckpointError
from fastppo.model import load_model, load_tokenizer
from fastppo.model.writing import write_model
from fastppo.run_folder import BEST, CHECKPOINTS, MODEL, read_settings


def export_run(
    run: str | Path,
    folder: str | Path | None = None,
    *,
    step: int | None = None,
    best: bool = False,
    model: str | Path | None = None,
) -> Path:
    """Write the policy and the tokenizer of a run's newest checkpoint, of the one of `step`, or of the best step, and return where.

    folder: new or empty; by default in the run folder `model`, `model-step-000120` where a step is chosen, or `best`.
    best: of the step that the newest checkpoint names as the best so far; the run has to have `evaluation.keep_best`.
    model: which model the run started from, for its architecture and tokenizer; by default the one that its config.yaml names.
    Raises ValueError or CheckpointError naming what is missing.
    """
    run = Path(run).expanduser()
    path, policy = _best_policy(run, step) if best else _policy(run, step)
    settings = (read_settings(run) or {}).get("model", {})
    name = model or settings.get("name")
    if not name:
        raise ValueError(f"{run} does not say which model it started from: name it (--model)")
    if folder is None:
        folder = run / (BEST if best else MODEL if step is None else f"{MODEL}-{path.name}")
    elif (folder := Path(folder).expanduser()).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder is {str(folder)!r}, which is not empty, expected a new or an empty one")
    tokenizer = load_tokenizer(model or settings.get("tokenizer") or name)
    trained = load_model(name, dtype=next(iter(policy.values())).dtype, device="cpu")
    try:
        trained.load_state_dict(policy)
    except RuntimeError as error:
        raise CheckpointError(f"{path} holds the weights of another model than {name}: {error}") from error
    folder.mkdir(parents=True, exist_ok=True)
    write_model(trained, tokenizer, folder)
    return folder


def _best_policy(run: Path, step: int | None) -> tuple[Path, dict]:
    """(checkpoint, the policy's weights)"""
    if step is not None:
        raise ValueError(f"step is {step} and best is True, expected one of them")
    newest = load_latest_checkpoint(run / CHECKPOINTS)
    best = None if newest is None else newest[1][1].get("best", {}).get("step")
    if best not in list_checkpoints(run / CHECKPOINTS):
        raise ValueError(f"{run} has no checkpoint of its best step, expected a run with evaluation.keep_best")
    return _policy(run, best)


def _policy(run: Path, step: int | None) -> tuple[Path, dict]:
    """(checkpoint, the policy's weights)"""
    root = run / CHECKPOINTS
    checkpoints = list_checkpoints(root)
    if not checkpoints:
        raise ValueError(f"{run} has no checkpoints, expected a run folder with some")
    if step is None:
        path, (tensors, _, _) = load_latest_checkpoint(root)
    elif step in checkpoints:
        path = checkpoints[step]
        tensors, _, _ = load_checkpoint(path)
    else:
        raise ValueError(f"step is {step}, expected one that has a checkpoint: {', '.join(map(str, checkpoints))}")
    return path, tensors["policy"]
