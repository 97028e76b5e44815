"""The clock of a step: on a GPU a phase ends when its kernels have, not when they were launched."""

from __future__ import annotations

import time

import pytest
import torch

from fastppo.metrics import Clock


class StandIn:
    """A GPU of which the host waits for all that was launched, 30 ms each."""

    def __init__(self) -> None:
        self.launched, self.waits = 0, 0

    def current_stream(self, device: torch.device) -> StandIn:
        assert device.type == "cuda"
        return self

    def synchronize(self) -> None:
        self.waits += 1
        time.sleep(0.03 * self.launched)
        self.launched = 0


@pytest.fixture
def gpu(monkeypatch):
    made = StandIn()
    monkeypatch.setattr(torch.cuda, "current_stream", made.current_stream)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2e9)
    return made


def test_a_phase_waits_for_its_kernels_once(gpu):
    clock = Clock(torch.device("cuda"))
    for number, phase in enumerate(("time/rollout", "time/update"), start=1):
        with clock(phase):
            gpu.launched = number
        assert gpu.waits == number
    metrics = clock.metrics(sampled_tokens=90)
    assert metrics["time/rollout"] >= 0.03 and metrics["time/update"] >= 0.06, "each pays for its own kernels"
    assert metrics["perf/tokens_per_second"] == 90 / metrics["time/step"] <= 1000
    assert metrics["perf/max_memory_gb"] == 2


def test_a_cpu_is_waited_for_by_nobody(gpu):
    clock = Clock(torch.device("cpu"))
    with clock("time/rollout"):
        pass
    assert gpu.waits == 0 and clock.metrics(1)["perf/max_memory_gb"] > 0
