"""What the host waits for of a GPU between a rollout and the weights after it: never for a micro-batch."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
import torch

from tests.stand_in_gpu import DEVICE, stand_in_gpu
from tests.trainer.steps import Step

# Once a minibatch: its metrics and gradient norms, which decide whether it is applied.
A_MINIBATCH = Counter({"learner._numbers: _to_copy": 1})


FAMILIES, NUMBERS, CRITICS = ("llama", "mistral-window", "gemma2"), (1, 3), ("separate", "shared")
# In which every family meets every n and every critic, and these meet each other; the rest is slow.
PAIRS = {
    ("llama", 1, "separate"),
    ("llama", 3, "shared"),
    ("mistral-window", 1, "shared"),
    ("mistral-window", 3, "separate"),
    ("gemma2", 1, "separate"),
    ("gemma2", 3, "shared"),
}
STEPS = [
    pytest.param(*step, marks=() if step in PAIRS else pytest.mark.slow) for step in product(FAMILIES, NUMBERS, CRITICS)
]


@pytest.mark.parametrize(("family", "n", "critic"), STEPS)
def test_no_micro_batch_waits(family, n, critic):
    """Prompts of one sample, and shared ones; attention that a kernel knows, with a window, and written out."""
    step = Step(family, n, critic, DEVICE)
    for optimizer in step.learner.optimizers.values():
        for group in optimizer.adamw.param_groups:
            group["fused"] = False  # the fused one knows real devices only
    with stand_in_gpu() as gpu:
        evaluation = step.evaluate()
        step.accumulate(evaluation)
        assert gpu.waits == []
        step.update(evaluation)
    minibatches = sum(map(len, step.plan))
    assert Counter(gpu.waits) == Counter({name: count * minibatches for name, count in A_MINIBATCH.items()})


def test_the_stand_in_sees_what_waits():
    host = torch.tensor([1, 2, 3])
    with stand_in_gpu() as gpu:
        x = torch.arange(3, device=DEVICE)
        host.pin_memory().to(DEVICE, non_blocking=True)
        x[1:] + host.max().item()
        x.repeat_interleave(x, output_size=9)
        assert gpu.waits == []
        waiting = [
            lambda: x.tolist(),
            lambda: bool(x.sum()),
            lambda: x[[0, 1]],
            lambda: torch.tensor([1.0], device=DEVICE),
            lambda: x.new_tensor([1]),
            lambda: host.to(DEVICE),
            lambda: host.to(DEVICE, non_blocking=True),
            lambda: x.copy_(host),
        ]
        for number, call in enumerate(waiting, start=1):
            call()
            assert len(gpu.waits) == number
        for call in (lambda: x[x > 1], x.nonzero, lambda: x.repeat_interleave(x)):  # no shapes without numbers
            before = len(gpu.waits)
            with pytest.raises((NotImplementedError, RuntimeError)):
                call()
            assert len(gpu.waits) == before + 1
