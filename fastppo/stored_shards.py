"""Tensors that several ranks have written together (`torch.distributed.checkpoint`), read whole or in parts, by any number of ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from fastppo.errors import CheckpointError
from fastppo.model.divided import local_part, part_of

_ALONE = (
    "torch.distributed is disabled"  # what torch says to whoever reads without the other ranks, as everyone does here
)


class StoredShards(Mapping[str, Mapping[str, Tensor]]):
    """name of a group ("policy") -> name -> tensor, on the CPU. Nothing is read before it is asked for, and no rank waits for another.

    groups: those that were saved; of an empty one, of an optimizer that has made no step, the folder knows nothing.
    """

    def __init__(self, folder: Path, groups: Iterable[str]) -> None:
        """Raises CheckpointError where the folder cannot be read."""
        self._folder = folder
        self._groups: dict[str, dict[str, TensorStorageMetadata]] = {name: {} for name in groups}
        try:
            found = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        except Exception as error:  # pickle has many
            raise CheckpointError(f"checkpoint {folder} cannot be read: {error}") from error
        for key, stored in found.items():
            group, name = key.split("/", 1)
            self._groups.setdefault(group, {})[name] = stored

    def __getitem__(self, group: str) -> dict[str, Tensor]:
        """All of a group, whole."""
        whole = {
            name: torch.empty(stored.size, dtype=stored.properties.dtype, device="cpu")
            for name, stored in self._groups[group].items()
        }
        self.read_into(group, whole)
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def read_into(self, group: str, targets: Mapping[str, Tensor]) -> None:
        """Of a sharded target this rank's part alone is read. Raises CheckpointError where names or shapes are others."""
        _require_fitting(targets, {name: stored.size for name, stored in self._groups[group].items()}, group)
        wanted = {f"{group}/{name}": tensor for name, tensor in targets.items()}
        if not wanted:
            return
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=_ALONE)
                dcp.load(wanted, storage_reader=dcp.FileSystemReader(self._folder), no_dist=True)
        except (CheckpointException, OSError, RuntimeError) as error:
            raise CheckpointError(f"{group} in {self._folder} cannot be read: {error}") from error


@torch.no_grad()
def read_into(targets: Mapping[str, Tensor], stored: Mapping[str, Mapping[str, Tensor]], group: str) -> None:
    """Put `stored[group]` into tensors of these names, whole or sharded ones. Raises CheckpointError where names or shapes are others."""
    if isinstance(stored, StoredShards):
        stored.read_into(group, targets)
        return
    _require_fitting(targets, {name: tensor.shape for name, tensor in stored[group].items()}, group)
    for name, target in targets.items():
        local_part(target).copy_(part_of(stored[group][name], target))


def _require_fitting(targets: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], group: str) -> None:
    odd = sorted(targets.keys() ^ shapes.keys())
    odd += [name for name, tensor in targets.items() if name in shapes and tensor.shape != shapes[name]]
    if odd:
        raise CheckpointError(f"the checkpoint's {group} has other tensors, or of other shapes: {', '.join(odd[:5])}")
