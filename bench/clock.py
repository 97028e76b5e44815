"""Seconds that calls take: by the wall clock on a CPU, by the device's own events on a GPU, where calls can also be replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch

CPU = torch.device("cpu")


class PhaseClock:
    """Seconds of the phases of a call, each from where the one before it ended; on a GPU with its last kernel."""

    def __init__(self, device: torch.device = CPU) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._since = perf_counter()

    def end(self, phase: str) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = perf_counter()
        self.seconds[phase], self._since = now - self._since, now


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one run. On a GPU: from where its stream reaches the first launch to where it has done the last."""
    if device.type != "cuda":
        start = perf_counter()
        run()
        return perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def capture(run: Callable[[], object], device: torch.device) -> Callable[[], None] | None:
    """Replays what `run` launches, without the host's part of it; None where that cannot be captured (it waits for the device, say)."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize(device)
        return None
    return graph.replay
