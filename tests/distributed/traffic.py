"""Bytes that collectives carry, counted where torch hands them to the process group."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

GATHERS = {
    "c10d::_allgather_base_": 0,
    "_c10d_functional::all_gather_into_tensor": None,
}  # place of the whole among the arguments
REDUCTION = "c10d::_reduce_scatter_base_"


class CountedTraffic(TorchDispatchMode):
    """Inside the block counts what one of `ranks` ranks gets from the others in gathers, and gives them in reductions that leave it a part."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self._ranks, self.gathered, self.reduced = ranks, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found, name = func(*args, **kwargs or {}), func._schema.name
        if name in GATHERS:
            whole = found if GATHERS[name] is None else args[GATHERS[name]]
            self.gathered += whole.nbytes * (self._ranks - 1) // self._ranks
        if name == REDUCTION:
            self.reduced += args[1].nbytes * (self._ranks - 1) // self._ranks
        return found
