"""Several processes that make one run, a rank each: records are known to all, work is divided, and what ends one rank ends all.

Every rank runs the same code on the same records, so that whatever is decided from them is decided alike. Ranks meet in `Ranks.exchange` and
`Ranks.sum_`, which every rank calls in the same order. An error of one rank is told to the others where they meet next, so that none waits for
what will not come. One process is a rank of its own; then nothing here does anything.
"""

from __future__ import annotations

import atexit
import os
import pickle
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from threading import Thread
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fastppo.distributed_config import DistributedConfig
from fastppo.errors import TrainingError, is_users
from fastppo.interruption import Interrupted
from fastppo.model import resolve_device
from fastppo.model.sharding import Sharding
from fastppo.out_of_memory import is_out_of_memory
from fastppo.run_folder import differences

Item = TypeVar("Item")
RENDEZVOUS_SECONDS = 50.0  # for the store that torchrun, or rank 0, keeps
ROLL_CALL_SECONDS = 5.0  # after which a rank counts as gone where a meeting has failed
BUCKET = 1 << 23  # numbers that are summed at a time where tensors are smaller than that


class LostRank(TrainingError):
    """A rank is gone, or did not come in time."""


class _Said(NamedTuple):
    """What a rank brings to a meeting."""

    what: str
    value: Any = None
    error: str | None = None
    out_of_memory: bool = False
    signal: int | None = None


class Ranks:
    """This process among those that make a run.

    Args:
        rank, size: which of how many. local: which of those on this machine.
        timeout: seconds that a meeting may take.
        store: where a roll is called when a meeting fails; without one nobody can be named.
        device_type: of the tensors that are summed.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        local: int = 0,
        timeout: float = DistributedConfig.timeout,
        store: dist.Store | None = None,
        device_type: str = "cpu",
    ) -> None:
        self.rank, self.size, self.local, self.timeout = rank, size, local, timeout
        self.waited = 0.0
        """Seconds spent in meetings."""
        self.sent: Counter[str] = Counter()
        """Bytes that were given to each kind of meeting."""
        self._step = (0.0, Counter[str]())  # `waited` and `sent` where the step in hand began
        self._store, self._lost, self._told = store, None, None
        if size > 1:
            patience = timedelta(seconds=timeout)
            self._control = dist.new_group(backend="gloo", timeout=patience)
            self._data = dist.new_group(backend="nccl", timeout=patience) if device_type == "cuda" else self._control

    @property
    def first(self) -> bool:
        """Whether this is the rank that records the run."""
        return self.rank == 0

    @property
    def lost(self) -> str | None:
        """Who is gone, in a sentence, once a meeting has failed for want of them."""
        return self._lost

    @property
    def restarted(self) -> bool:
        """Whether torchrun has started these processes again after a failure (`--max-restarts`)."""
        return self.size > 1 and _restarts() > 0

    def own(self, items: Sequence[Item]) -> list[Item]:
        """This rank's share: every `size`-th, from its own number on."""
        return list(items[self.rank :: self.size])

    # Meetings

    def exchange(self, what: str, value: Any = None) -> list[Any]:
        """Every rank's `value`, in the order of the ranks. what: the name of the meeting, in errors.

        Raises LostRank where a rank does not come within `timeout`, and what another rank has told of an error: MemoryError where memory ran out
        there, Interrupted where a signal ends the run, else TrainingError.
        """
        return [value] if self.size == 1 else self._meet(_Said(what, value))

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """A block that every rank leaves without an error, or none: what one raises, the others hear of where they meet next."""
        try:
            yield
        except BaseException as error:
            self._tell(what, error)
            raise
        self.exchange(what)

    def broadcast(self, what: str, value: Any = None) -> Any:
        """Rank 0's `value`."""
        return self.exchange(what, value if self.first else None)[0]

    def sum_(self, what: str, tensors: Sequence[Tensor]) -> None:
        """Replace tensors, which have the same shapes on every rank, by their sums over the ranks: the same bits everywhere."""
        if self.size == 1 or not tensors:
            return
        groups = list(_groups(tensors))
        room = _room_for(groups)  # before anybody waits: memory that runs out here is told of
        self.exchange(f"sum of {what}")
        started = time.perf_counter()
        for group in groups:
            together, sizes = group[0], [tensor.numel() for tensor in group]
            if not _is_summed_in_place(group):
                together = room[group[0].dtype][: sum(sizes)]
                torch.cat([tensor.reshape(-1) for tensor in group], out=together)
            self._call(what, dist.all_reduce, together, group=self._data)
            self.sent[what] += together.numel() * together.element_size()
            if together is not group[0]:
                for tensor, part in zip(group, together.split(sizes), strict=True):
                    tensor.copy_(part.view_as(tensor))
        self.waited += time.perf_counter() - started

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Raises ValueError naming what is not on every rank as on rank 0."""
        everyone = self.exchange("comparison of the ranks", dict(facts))
        for rank, theirs in enumerate(everyone):
            if found := differences(everyone[0], theirs):
                raise ValueError(
                    f"rank {rank} is not as rank 0: {'; '.join(found)} (rank 0 -> rank {rank}); expected the same on every rank"
                )

    def part(self, what: str) -> None:
        """Where all ranks end after an error: none leaves before the others come here too, or are gone."""
        with suppress(LostRank):
            self.exchange(what)

    def step_metrics(self) -> dict[str, float]:
        """Of the step that ends here, the same on every rank; none of one rank alone."""
        if self.size == 1:
            return {}
        waited, sent = self.waited - self._step[0], self.sent - self._step[1]
        everyone = self.exchange("metrics of the step", (waited, sent.total()))
        self._step = self.waited, self.sent.copy()
        waits = [seconds for seconds, _ in everyone]
        return {
            "distributed/waited_seconds": max(waits),
            "distributed/slowest_rank": float(waits.index(min(waits))),
            "distributed/sent_mb": max(count for _, count in everyone) / 1e6,
        }

    def _meet(self, said: _Said) -> list[Any]:
        if self._lost is not None:
            raise LostRank(self._lost)
        packed = pickle.dumps(said)
        self.sent[said.what] += len(packed)
        found: list[bytes] = [packed] * self.size
        started = time.perf_counter()
        self._call(said.what, dist.all_gather_object, found, packed, group=self._control)
        self.waited += time.perf_counter() - started
        everyone: list[_Said] = [pickle.loads(each) for each in found]  # of this run's own processes
        if said.error is None:
            self._raise_what_was_told(everyone)
        return [each.value for each in everyone]

    def _raise_what_was_told(self, everyone: list[_Said]) -> None:
        for rank, said in enumerate(everyone):
            if said.error is not None:
                text = f"rank {rank}: {said.error}"
                self._told = (
                    Interrupted(said.signal)
                    if said.signal is not None
                    else (MemoryError if said.out_of_memory else TrainingError)(text)
                )
                raise self._told
        if len(places := {said.what for said in everyone}) > 1:
            raise RuntimeError(f"ranks have come to different meetings: {', '.join(sorted(places))}")

    def _tell(self, what: str, error: BaseException) -> None:
        """Let the others know, unless they do."""
        if self.size == 1 or self._lost is not None or self._is_told(error):
            return
        signal = error.number if isinstance(error, Interrupted) else None
        kind = type(error).__name__
        text = str(error) if is_users(error) else f"{kind}: {error}" if str(error) else kind
        self._told = error
        try:
            self._meet(_Said(what, None, text, is_out_of_memory(error), signal))
        except LostRank:
            return  # `error` is what is to be heard of

    def _is_told(self, error: BaseException | None) -> bool:
        while error is not None:
            if error is self._told:
                return True
            error = error.__cause__
        return False

    def _call(self, what: str, collective: Any, *arguments: Any, **options: Any) -> None:
        try:
            collective(*arguments, **options)
        except (RuntimeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            self._lose(what, error)

    def _lose(self, what: str, error: Exception) -> NoReturn:
        missing = self._roll_call()
        who = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}" if missing else "a rank"
        self._lost = (
            f"{who} of {self.size} did not come to: {what}. It has ended, hangs, or needs longer than distributed.timeout = "
            f"{self.timeout:g} s ({' '.join(str(error).split())[:300]})"
        )
        raise LostRank(self._lost) from error

    def _roll_call(self) -> list[int]:
        """Who does not answer: whoever is at a meeting that fails, comes here.

        In a thread that is left behind where the store itself is out of reach: it waits for an answer without end over a network that is cut. Then
        those count as gone that are not on this machine.
        """
        if self._store is None:
            return []
        found: list[list[int]] = []
        thread = Thread(target=lambda: found.append(self._absent()), daemon=True)
        thread.start()
        thread.join(2 * ROLL_CALL_SECONDS)
        return found[0] if found else self._elsewhere()

    def _absent(self) -> list[int]:
        deadline = time.monotonic() + ROLL_CALL_SECONDS
        try:
            self._store.set(f"here/{self.rank}", "")
            return [rank for rank in range(self.size) if not self._is_here(rank, deadline)]
        except dist.DistNetworkError:  # whoever keeps the store is gone: torchrun, or else rank 0
            return [] if "TORCHELASTIC_RUN_ID" in os.environ else [0]

    def _elsewhere(self) -> list[int]:
        """The ranks of other machines, which torchrun numbers machine by machine."""
        first = self.rank - self.local
        return [rank for rank in range(self.size) if not first <= rank < first + _on_this_machine()]

    def _is_here(self, rank: int, deadline: float) -> bool:
        patience = max(deadline - time.monotonic(), 0.1)
        try:
            self._store.wait([f"here/{rank}"], timedelta(seconds=patience))
        except dist.DistStoreError:  # nobody within that time
            return False
        return True


ALONE = Ranks()
_connected: list[Ranks] = []  # this process's, once it is one of several


def device_of(setting: str) -> torch.device:
    """`resolve_device`, where each of several processes of a machine has a GPU of its own."""
    device = resolve_device(setting)
    if device.type == "cuda" and device.index is None and _size() > 1:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    return device


def ranks_of(config: DistributedConfig, device: torch.device) -> Ranks:
    """This process among those that `torchrun` has started, or among those of a process group that the caller has made; alone else.

    They are connected at the first call, which every rank has to make. Raises TrainingError where the others cannot be reached.
    """
    if _size() == 1:
        return ALONE
    if not _connected:
        store = None if dist.is_initialized() else _connect(config, device)
        place = {"local": int(os.environ.get("LOCAL_RANK", 0)), "timeout": config.timeout}
        _connected.append(Ranks(dist.get_rank(), dist.get_world_size(), **place, store=store, device_type=device.type))
    return _connected[0]


def versions() -> dict[str, str]:
    """Of what computes, by package."""
    found = {}
    for package in ("fastppo", "torch", "transformers", "numpy"):
        with suppress(PackageNotFoundError):
            found[f"version of {package}"] = version(package)
    return found


def sharding_of(config: DistributedConfig, ranks: Ranks, device: torch.device) -> Sharding | None:
    """How weights are divided; None where every rank has all of them. One rank has nothing to divide."""
    if config.sharding == "none" or ranks.size == 1:
        return None
    mesh = init_device_mesh(device.type, (ranks.size,))
    options = {"reduce_dtype": getattr(torch, config.reduce_dtype), "cpu_offload": config.cpu_offload}
    return Sharding(mesh, **options, meet=lambda: ranks.exchange("part of a layer"))


def team_of_ranks(config: DistributedConfig, ranks: Ranks, device: torch.device) -> DeviceMesh | None:
    """Those that sample together with this rank, which stand side by side; None where it samples alone. Every rank has to call it.

    Raises ValueError where the ranks are no multiple of `tensor_parallel`.
    """
    size = config.tensor_parallel
    if ranks.size % size:
        raise ValueError(
            f"distributed.tensor_parallel is {size}, expected a divisor of the number of processes, {ranks.size} (torchrun)"
        )
    if size == 1:
        return None
    patience = timedelta(seconds=config.timeout)
    teams = [dist.new_group(list(range(first, first + size)), timeout=patience) for first in range(0, ranks.size, size)]
    return DeviceMesh.from_group(teams[ranks.rank // size], device.type)


def refuse_several(what: str) -> None:
    """Raises ValueError where torchrun has started several processes, which would all do the same."""
    if _size() > 1:
        raise ValueError(
            f"{what} is started in {_size()} processes (WORLD_SIZE), expected one: start it without torchrun"
        )


def _size() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def _on_this_machine() -> int:
    """Ranks that torchrun has started here."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _restarts() -> int:
    """How often torchrun has started these processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def _connect(config: DistributedConfig, device: torch.device) -> dist.Store:
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=RENDEZVOUS_SECONDS)))
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"the rendezvous at {place} (MASTER_ADDR, MASTER_PORT) cannot be reached within {RENDEZVOUS_SECONDS:g} s: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    # A store that has outlived a failure still has the addresses of the processes that are gone.
    store = dist.PrefixStore(f"fastppo/{_restarts()}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    patience = timedelta(seconds=config.timeout)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"rank {rank} could not be connected with the others at {place}: {' '.join(str(error).split())[:300]}"
        ) from error
    atexit.register(_disconnect)
    return store


def _disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _groups(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type, side by side, that are summed at once."""
    group: list[Tensor] = []
    for tensor in tensors:
        full = sum(member.numel() for member in group) + tensor.numel() > BUCKET
        if group and (full or tensor.dtype != group[0].dtype):
            yield group
            group = []
        group.append(tensor)
    yield group


def _is_summed_in_place(group: list[Tensor]) -> bool:
    """Of one tensor, a large one for instance; several are laid side by side."""
    return len(group) == 1 and group[0].is_contiguous()


def _room_for(groups: list[list[Tensor]]) -> dict[torch.dtype, Tensor]:
    """By type, for the largest of the groups that need it."""
    sizes: dict[torch.dtype, int] = {}
    for group in groups:
        if not _is_summed_in_place(group):
            count = sum(tensor.numel() for tensor in group)
            sizes[group[0].dtype] = max(count, sizes.get(group[0].dtype, 0))
    return {dtype: groups[0][0].new_empty(size, dtype=dtype) for dtype, size in sizes.items()}
