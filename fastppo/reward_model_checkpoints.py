"""Checkpoints of a reward model's training: the folders that Transformers' Trainer writes, sealed once they are whole.

    root/checkpoint-120/model.safetensors optimizer.pt scheduler.pt rng_state.pth trainer_state.json ... manifest.json

The manifest has sizes and hashes of all files and comes last: a folder without it, or with another content, is what a kill has left. Older ones are
removed only once a new one is sealed. `optimizer.pt`, `scheduler.pt` and `rng_state.pth` are torch's pickles, which Transformers reads with
`weights_only`.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastppo.checkpoint import MANIFEST, check_files, fingerprint, flush_files
from fastppo.errors import CheckpointError
from fastppo.run_folder import CHECKPOINTS

IDENTITY = "identity.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class Sealed(NamedTuple):
    """A checkpoint that is whole."""

    step: int
    path: Path
    identity: dict[str, Any]
    """What it is bound to."""


class SealedCheckpoints:
    """Those in a folder, of which the newest `keep` stay. identity: what they are bound to, as plain JSON."""

    def __init__(self, root: Path, keep: int, identity: Mapping[str, Any]) -> None:
        self.root, self.identity, self._keep = root, dict(identity), keep

    def newest(self) -> Sealed | None:
        """The newest that is whole; damaged ones are passed over with a warning. None where none was sealed, CheckpointError where all of these are
        damaged."""
        problems = []
        for step, path in reversed(_folders(self.root).items()):
            if not (path / MANIFEST).exists():
                continue
            try:
                manifest = json.loads((path / MANIFEST).read_text())
                check_files(path, manifest)
                return Sealed(step, path, json.loads((path / IDENTITY).read_text()))
            except (OSError, ValueError, CheckpointError) as error:
                problems.append(f"checkpoint {path} is not whole: {error}")
                warnings.warn(f"{problems[-1]}; using the one before it", stacklevel=2)
        if problems:
            raise CheckpointError(f"no checkpoint in {self.root} can be used: {'; '.join(problems)}")
        return None

    def remove_after(self, step: int) -> None:
        """Those of later steps than the one that is gone on from: none of them is whole."""
        for later in [number for number in _folders(self.root) if number > step]:
            shutil.rmtree(self.root / f"checkpoint-{later}")

    def seal(self, step: int) -> None:
        """The checkpoint of `step` is written; older ones than the newest `keep` go."""
        path = self.root / f"checkpoint-{step}"
        (path / IDENTITY).write_text(json.dumps(self.identity, indent=1))
        manifest = {file.name: fingerprint(file) for file in sorted(path.iterdir()) if file.name != MANIFEST}
        (path / MANIFEST).write_text(json.dumps(manifest, indent=1))
        flush_files(path, (*manifest, MANIFEST))
        for old in [number for number in _folders(self.root) if number <= step][: -self._keep]:
            shutil.rmtree(self.root / f"checkpoint-{old}", ignore_errors=True)


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint of a training that was sealed, without a look inside."""
    folders = _folders(Path(output_dir).expanduser() / CHECKPOINTS).values()
    return next((path for path in reversed(folders) if (path / MANIFEST).exists()), None)


def _folders(root: Path) -> dict[int, Path]:
    """step -> folder, in order of steps"""
    folders = root.iterdir() if root.is_dir() else ()
    matches = ((_NAME.fullmatch(path.name), path) for path in folders)
    return dict(sorted((int(match[1]), path) for match, path in matches if match))
