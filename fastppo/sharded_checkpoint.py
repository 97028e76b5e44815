"""Checkpoints of which every rank writes its part, in the background, while training goes on (`torch.distributed.checkpoint`).

    root/step-000120/shards/__0_0.distcp __1_0.distcp ... .metadata    state.json manifest.json

They become whole as other checkpoints do (`checkpoint.py`): in a temporary folder, with a manifest, by one rename, which rank 0 makes once every
rank has written and hashed its files. All ranks see one root.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp

from fastppo.checkpoint import (
    SHARDS,
    begin_checkpoint,
    fingerprint,
    publish_checkpoint,
    reported,
    temporary_folder,
)
from fastppo.errors import CheckpointError

Found = TypeVar("Found")


class ShardedCheckpoints:
    """Writes the checkpoints of a run, one after the other. Every rank makes one, and calls it as the others do.

    Args:
        timeout: seconds that ranks wait for each other before a checkpoint counts as failed.
    """

    def __init__(self, timeout: float) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))  # of nobody else's messages
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None

    def save(
        self,
        root: str | Path,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        *,
        keep: int,
        spared: Collection[int] = (),
    ) -> None:
        """Begin to write checkpoint `step`, as `save_checkpoint` has it, from a copy of all that is made before this returns.

        tensors: sharded ones, of which this rank has a part, and others, which are the same on every rank.
        Raises CheckpointError on every rank where one cannot begin, or the checkpoint before could not be written.
        """
        self.wait()
        root = Path(root)
        temporary = root / self._agreed_of_first(lambda: _begun(root, step))
        flat = {f"{group}/{name}": tensor for group, named in tensors.items() for name, tensor in named.items()}
        with reported(root, step, temporary):
            writer = dcp.FileSystemWriter(temporary / SHARDS)
            written = dcp.async_save(flat, storage_writer=writer, process_group=self._group)
        rest = {"names": sorted(tensors), "state": copy.deepcopy(state), "keep": keep, "spared": set(spared)}
        self._pending = self._thread.submit(self._finish, written, temporary, step, **rest)

    def wait(self) -> Path | None:
        """Wait until the checkpoint that is being written is whole, and return where it is; None where there is none. Raises CheckpointError
        on every rank where it could not be written."""
        pending, self._pending = self._pending, None
        return None if pending is None else pending.result()

    def close(self) -> None:
        """After the last checkpoint."""
        self._thread.shutdown()

    def _finish(
        self, written: Future, temporary: Path, step: int, *, names: list[str], state: Mapping[str, Any], **kept: Any
    ) -> Path:
        def hashed() -> dict[str, Any]:
            with reported(temporary.parent, step, temporary):
                written.result()
                mine = sorted((temporary / SHARDS).glob(f"__{dist.get_rank(self._group)}_*.distcp"))
                return {f"{SHARDS}/{path.name}": fingerprint(path) for path in mine}

        manifest = {name: value for found in self._agreed(hashed) for name, value in found.items()}

        def published() -> str:
            with reported(temporary.parent, step, temporary):
                metadata = f"{SHARDS}/.metadata"
                whole = manifest | {metadata: fingerprint(temporary / metadata)}
                return publish_checkpoint(temporary, step, whole, names, state, **kept).name

        return temporary.parent / self._agreed_of_first(published)

    def _agreed_of_first(self, act: Callable[[], Found]) -> Found:
        """What `act` makes on rank 0, which alone does it."""
        first = dist.get_rank(self._group) == 0
        return self._agreed(lambda: act() if first else None)[0]

    def _agreed(self, act: Callable[[], Found]) -> list[Found]:
        """What `act` makes on every rank. A CheckpointError of one is raised on all."""
        said: tuple[Any, str | None] = (None, None)
        try:
            said = act(), None
        except CheckpointError as error:
            said = None, str(error)
        everyone: list[Any] = [None] * dist.get_world_size(self._group)
        try:
            dist.all_gather_object(everyone, said, group=self._group)
        except RuntimeError as error:
            raise CheckpointError(f"a rank did not come to write a checkpoint: {error}") from error
        for _, text in everyone:
            if text is not None:
                raise CheckpointError(text)
        return [made for made, _ in everyone]


def _begun(root: Path, step: int) -> str:
    with reported(root, step, temporary_folder(root, step)) as temporary:
        begin_checkpoint(temporary)
    return temporary.name
