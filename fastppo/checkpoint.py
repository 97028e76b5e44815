"""Checkpoints that survive a kill at any moment: safetensors and JSON, hashed, renamed into place when complete.

    root/step-000120/policy.safetensors ... state.json manifest.json

A checkpoint is written to a hidden temporary folder, every file is flushed to the disk, a manifest with sizes and SHA-256 comes last, and one
rename makes it visible. Older ones are removed only afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MANIFEST = "manifest.json"
_TEMPORARY = ".writing-"
_NAME = re.compile(r"step-(\d{6,})")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or cannot be read; the message names the path and what to do."""


def save_checkpoint(
    root: str | Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], *, keep: int
) -> Path:
    """Write `tensors` (file name without ending -> named tensors) and `state` (anything JSON can hold) as checkpoint `step`.

    Keeps the newest `keep` checkpoints. Raises CheckpointError when the disk is full or anything else fails: nothing is left behind, and the
    checkpoints that were there still are.
    """
    root = Path(root)
    target, temporary = root / f"step-{step:06d}", root / f"{_TEMPORARY}{step:06d}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root)
        temporary.mkdir()
        for name, named in tensors.items():
            save_file(_separate(named), temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
        manifest = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        if target.exists():  # written before a kill, then reached again after a resume from an older one
            shutil.rmtree(target)
        temporary.rename(target)
        _flush(root)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {target} could not be written: {error}. The earlier ones are untouched; free some space "
            "or choose another output_dir, then resume"
        ) from error
    for _, old in sorted(_complete(root).items())[:-keep]:
        shutil.rmtree(old)
    return target


def load_checkpoint(path: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], int]:
    """(tensors, state, step) of a checkpoint on the CPU. Raises CheckpointError when a file is missing or is not what was written."""
    path = Path(path)
    manifest = _verify(path)
    tensors = {
        name.removesuffix(".safetensors"): load_file(path / name) for name in manifest if name.endswith(".safetensors")
    }
    state = json.loads((path / "state.json").read_text())
    return tensors, state, state.pop("step")


def latest_checkpoint(root: str | Path) -> Path | None:
    """The newest checkpoint under `root` that is whole; damaged ones are passed over with a warning. None when there is none."""
    for _, path in sorted(_complete(Path(root)).items(), reverse=True):
        try:
            _verify(path)
            return path
        except CheckpointError as error:
            warnings.warn(f"{error}; using the one before it", stacklevel=2)
    return None


def _complete(root: Path) -> dict[int, Path]:
    """step -> folder of every checkpoint that was renamed into place."""
    folders = root.iterdir() if root.is_dir() else ()
    matches = ((_NAME.fullmatch(path.name), path) for path in folders)
    return {int(match.group(1)): path for match, path in matches if match}


def _verify(path: Path) -> dict[str, dict[str, Any]]:
    """The manifest, once every file it lists is there with the size and hash it lists."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, expected in manifest.items():
            if _fingerprint(path / name) != expected:
                raise CheckpointError(
                    f"checkpoint {path} is damaged: {name} is not what was written; delete the folder"
                )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}; delete the folder") from error
    return manifest


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _flush(path: Path) -> None:
    """Force a file, or a folder's entries, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(root: Path) -> None:
    """Folders that a killed process was still writing."""
    for path in root.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path)


def _separate(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors with storage of their own: safetensors refuses tied weights."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in named.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return separate


def flatten_optimizer(
    optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, JSON state) of an optimizer, keyed by parameter name: `exp_avg/<name>`, `exp_avg_sq/<name>`, `step/<name>`."""
    names = {parameter: name for name, parameter in named.items()}
    tensors = {
        f"{key}/{names[parameter]}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }
    return tensors, {"parameters": sorted(name for name in named)}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """Put back what `flatten_optimizer` took out. Raises CheckpointError when names or shapes are not those of this optimizer."""
    if state["parameters"] != sorted(named):
        different = sorted(set(state["parameters"]) ^ set(named))
        raise CheckpointError(
            f"the checkpoint's optimizer has other parameters than this model: {', '.join(different[:5])}"
        )
    optimizer.state.clear()
    for key_and_name, value in tensors.items():
        key, name = key_and_name.split("/", 1)
        parameter = named[name]
        if value.dim() and value.shape != parameter.shape:
            raise CheckpointError(f"{key} of {name} has shape {list(value.shape)}, expected {list(parameter.shape)}")
        # AdamW keeps its step count as a CPU scalar whatever the parameter's device.
        optimizer.state[parameter][key] = value.clone() if not value.dim() else value.to(parameter.device)
