"""Checkpoints that survive a kill at any moment: safetensors and JSON, hashed, renamed into place when complete.

    root/step-000120/policy.safetensors ... state.json manifest.json

A checkpoint is written to a hidden temporary folder, every file is flushed to the disk, a manifest with sizes and SHA-256 comes last, and one
rename makes it visible. Older ones are removed only afterwards. One process at a time may write to a root. What goes wrong once a checkpoint is
complete is a warning: it is there. Of a run whose weights are divided among ranks the tensors are in the folder `shards` instead, which all ranks
write (`sharded_checkpoint.py`); whoever reads need not know.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastppo.errors import CheckpointError
from fastppo.low_bit import joined, parts_of
from fastppo.stored_shards import StoredShards

MANIFEST, STATE, SHARDS = "manifest.json", "state.json", "shards"
_TEMPORARY = ".writing-"
_REPLACED = ".replaced-"
_NAME = re.compile(rf"(?:{re.escape(_REPLACED)})?step-(\d{{6,}})")


Checkpoint = tuple[Mapping[str, Mapping[str, Tensor]], dict[str, Any], int]
"""(tensors by file, state, step)"""


def save_checkpoint(
    root: str | Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int,
    spared: Collection[int] = (),
) -> Path:
    """Write `tensors` (file name without ending -> named tensors) and `state` (anything JSON can hold) as checkpoint `step`.

    Keeps this checkpoint and the newest before it, `keep` in all, and those of the `spared` steps. Those of later steps stay: a resume passed
    over them because they are damaged, and counting them would push out the whole ones. Raises CheckpointError when the disk is full or
    anything else fails: nothing is left behind, and the checkpoints that were there still are.
    """
    root = Path(root)
    with reported(root, step, temporary_folder(root, step)) as temporary:
        begin_checkpoint(temporary)
        for name, named in tensors.items():
            save_file(_separate(named), temporary / f"{name}.safetensors")
        manifest = {path.name: fingerprint(path) for path in sorted(temporary.iterdir())}
        return publish_checkpoint(temporary, step, manifest, sorted(tensors), state, keep=keep, spared=spared)


def temporary_folder(root: Path, step: int) -> Path:
    """Where checkpoint `step` is written until it is whole."""
    return root / f"{_TEMPORARY}{step:06d}-{os.getpid()}"


def begin_checkpoint(temporary: Path) -> None:
    """Make the folder, and remove what a killed process has left."""
    temporary.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(temporary.parent)
    temporary.mkdir()


@contextmanager
def reported(root: Path, step: int, temporary: Path) -> Iterator[Path]:
    """What goes wrong in the block leaves nothing behind, and is a CheckpointError."""
    try:
        yield temporary
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        state_is_at_fault = isinstance(error, TypeError | ValueError)  # a full disk is an OSError or a SafetensorError
        cure = "" if state_is_at_fault else "; free some space or choose another output_dir, then resume"
        raise CheckpointError(
            f"checkpoint {checkpoint_path(root, step)} could not be written: {error}. The earlier ones are untouched{cure}"
        ) from error


def publish_checkpoint(
    temporary: Path,
    step: int,
    manifest: Mapping[str, Any],
    names: Sequence[str],
    state: Mapping[str, Any],
    *,
    keep: int,
    spared: Collection[int],
) -> Path:
    """Write state and manifest beside the tensors, of whose files `manifest` has the fingerprints, and rename the folder into place."""
    root = temporary.parent
    target = checkpoint_path(root, step)
    replaced = root / f"{_REPLACED}{target.name}"
    saved = {"step": step, "files": list(names), "state": state}
    (temporary / STATE).write_text(json.dumps(saved, indent=1))
    manifest = {**manifest, STATE: fingerprint(temporary / STATE)}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
    flush_files(temporary, (*manifest, MANIFEST))
    try:
        if (
            target.exists()
        ):  # reached again after a resume from an older one; still found under its other name until the rename below
            target.rename(replaced)
        temporary.rename(target)
    except OSError:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise
    _flush_folder(root, root)
    _remove_leftovers(root)
    up_to_now = {number: path for number, path in list_checkpoints(root).items() if number <= step}
    for old in list(up_to_now)[:-keep]:
        if old not in spared:
            _remove(up_to_now[old])
    return target


def checkpoint_path(root: str | Path, step: int) -> Path:
    """Where checkpoint `step` is once it is whole."""
    return Path(root) / f"step-{step:06d}"


def load_checkpoint(path: str | Path, *, verify: bool = True) -> Checkpoint:
    """(tensors, state, step) of a checkpoint on the CPU. Raises CheckpointError when a file is missing or, unless another rank has verified that,
    is not what was written."""
    path = Path(path)
    manifest = _read_manifest(path, verify)
    tensors: Mapping[str, Mapping[str, Tensor]] = {
        name.removesuffix(".safetensors"): load_file(path / name) for name in manifest if name.endswith(".safetensors")
    }
    saved = json.loads((path / STATE).read_text())
    if any(name.startswith(f"{SHARDS}/") for name in manifest):
        tensors = StoredShards(path / SHARDS, saved["files"])
    if lost := sorted(set(saved.get("files", ())) - set(tensors)):
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} does not list {lost[0]}.safetensors")
    return tensors, saved["state"], saved["step"]


def load_latest_checkpoint(root: str | Path) -> tuple[Path, Checkpoint] | None:
    """The newest checkpoint under `root` that is whole, and what it holds, read and hashed once.

    Damaged ones are passed over with a warning. None when there is none; CheckpointError when all are damaged.
    """
    problems = []
    for _, path in reversed(list_checkpoints(root).items()):
        try:
            found = load_checkpoint(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warnings.warn(f"{problem}; using {path.name}", stacklevel=2)
        return path, found
    if problems:
        raise CheckpointError(f"no checkpoint in {root} can be used: {'; '.join(problems)}")
    return None


def list_checkpoints(root: str | Path) -> dict[int, Path]:
    """step -> folder of every checkpoint that was renamed into place, in order of steps, without a look inside.

    One that was moved aside counts while its successor is not there.
    """
    root = Path(root)
    folders = sorted(root.iterdir()) if root.is_dir() else ()  # ".replaced-" sorts first, so the successor wins
    matches = ((_NAME.fullmatch(path.name), path) for path in folders)
    return dict(sorted({int(match.group(1)): path for match, path in matches if match}.items()))


def _read_manifest(path: Path, verify: bool) -> dict[str, dict[str, Any]]:
    """The manifest; `verify`: once every file it lists is there with the size and hash it lists."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if not isinstance(manifest, dict) or STATE not in manifest:
            raise ValueError(f"{MANIFEST} does not list {STATE}")
        if verify:
            check_files(path, manifest)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
    return manifest


def check_files(folder: Path, manifest: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises CheckpointError where a file is not what the manifest has the fingerprint of, OSError where it cannot be read."""
    for name, expected in manifest.items():
        if fingerprint(folder / name) != expected:
            raise CheckpointError(f"checkpoint {folder} is damaged: {name} is not what was written")


def fingerprint(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def flush_files(folder: Path, names: Sequence[str]) -> None:
    """Force files of a checkpoint, and the folders that they are in, onto the disk."""
    for name in names:
        _flush(folder / name)
    for place in {path.parent for path in map(folder.joinpath, names)}:
        _flush_folder(place, folder.parent)


def _flush(path: Path) -> None:
    """Force a file, or a folder's entries, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(path: Path, root: Path) -> None:
    """Some file systems refuse it for a folder. A power cut right after may then lose the checkpoint, and nothing else."""
    try:
        _flush(path)
    except OSError as error:
        warnings.warn(f"folders in {root} cannot be flushed to the disk: {error}", stacklevel=3)


def _remove_leftovers(root: Path) -> None:
    """Remove what a killed process was still writing, and what has a successor in its place."""
    for path in root.glob(f"{_TEMPORARY}*"):
        _remove(path)
    for path in root.glob(f"{_REPLACED}*"):
        if (root / path.name.removeprefix(_REPLACED)).exists():
            _remove(path)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:  # a file that another machine has open, over NFS
        warnings.warn(f"{folder} cannot be removed: {error}", stacklevel=3)


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
    """(tensors, JSON state) of an optimizer, keyed by parameter name: `exp_avg/<name>`, `exp_avg_sq/<name>`, `step/<name>`; of moments in 8 bits
    `exp_avg.codes/<name>` and so on.

    The tensors are the optimizer's own, not copies. Raises ValueError when it holds a parameter that `named` does not name, or state that is
    no tensor.
    """
    names = {parameter: name for name, parameter in named.items()}
    tensors: dict[str, Tensor] = {}
    for parameter, values in optimizer.state.items():
        if parameter not in names:
            raise ValueError(f"named lacks a parameter of the optimizer, of shape {list(parameter.shape)}")
        for key, value in values.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"{key} of {names[parameter]} is {type(value).__name__}, expected a tensor")
            for part, tensor in parts_of(value).items():
                tensors[f"{key}{part}/{names[parameter]}"] = tensor
    return tensors, {"parameters": sorted(named), "tensors": sorted(tensors)}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    named: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """Put copies of what `flatten_optimizer` took out back, bit for bit.

    Raises CheckpointError when names or shapes are not those of this optimizer; its state is then as it was.
    """
    for what, saved, present in (
        ("parameters", state["parameters"], named),
        ("tensors", state["tensors"], tensors),
    ):
        if different := sorted(set(saved) ^ set(present)):
            raise CheckpointError(
                f"the checkpoint's optimizer has other {what} than this model: {', '.join(different[:5])}"
            )
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key_and_name, value in tensors.items():
        key, name = key_and_name.split("/", 1)
        key, dot, part = key.partition(".")
        parts.setdefault((name, key), {})[dot + part] = value.to(named[name].device, copy=True)
    restored: dict[nn.Parameter, dict[str, Tensor]] = {}
    for (name, key), own in parts.items():
        parameter = named[name]
        value = joined(key, own, parameter.dtype)
        if key != "step" and value.shape != parameter.shape:
            raise CheckpointError(f"{key} of {name} has shape {list(value.shape)}, expected {list(parameter.shape)}")
        restored.setdefault(parameter, {})[key] = value
    optimizer.state.clear()
    optimizer.state.update(restored)
