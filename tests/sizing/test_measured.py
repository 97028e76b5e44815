"""The planned memory of steps on a CPU against their measured peaks: within 15 %."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from transformers import Qwen2ForCausalLM

from fastppo.bench.memory import CLEAR_REFS
from fastppo.bench.step_memory import CONFIG, LONG, LORA, MIB, SHARED, Row, checkpointing, step_peaks
from fastppo.sizing import memory_of
from tests.fresh import in_a_fresh_process
from tests.sizing.toys import setup_of_row

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not CLEAR_REFS.exists(), reason="peaks are read as on Linux")

AGREES = 0.15
GIVEN_BACK = 64 << 10
"""Free memory from these bytes on is the system's again: the holes of glibc's heap are no part of a plan, and toys' tensors are small."""


class HalfRow(Row):
    """In bfloat16, which the model's own modules run, with fp32 master weights. Without oneDNN: where a processor has products in bfloat16 it keeps
    45 MiB of its own here, which no plan counts."""

    def model(self) -> Qwen2ForCausalLM:
        torch.backends.mkldnn.set_flags(_enabled=False)  # in a process of its own
        return super().model().bfloat16()


def in_small_batches(config):
    """A minibatch of eight micro-batches, whose gradients add up."""
    return replace(config, learner=replace(config.learner, num_minibatches=1, tokens_per_microbatch=128))


WEIGHTS = {"hidden": 256, "layers": 4, "prompts": 8, "new_tokens": 8}
TOKENS = {"vocabulary": 256, "hidden": 64, "layers": 12, "prompts": 32, "new_tokens": 48}
ROWS = {
    "all weights": Row("", CONFIG, **WEIGHTS),
    "micro-batches": Row("", in_small_batches(CONFIG), **WEIGHTS | {"prompts": 32, "new_tokens": 24}),
    "adapters": Row("", LORA, **WEIGHTS),
    "many tokens": Row("", SHARED, **TOKENS),
    "many tokens, checkpointed": Row("", checkpointing(SHARED), **TOKENS),
    "many tokens, adapters, checkpointed": Row("", checkpointing(LORA), **LONG),
    "large vocabulary": Row("", SHARED, 1 << 16, hidden=64, layers=1, prompts=16, new_tokens=32),
    "large vocabulary, untied": Row("", SHARED, 1 << 16, hidden=64, layers=1, prompts=16, new_tokens=32, tied=False),
    "half precision": HalfRow("", SHARED, **WEIGHTS | {"prompts": 16, "new_tokens": 24}),
}


# In which weights, adapters, activations and logits are each the most of a step once; the rest is slow.
QUICK = {"all weights", "adapters", "many tokens", "large vocabulary"}


@pytest.mark.parametrize("name", [pytest.param(row, marks=() if row in QUICK else pytest.mark.slow) for row in ROWS])
def test_a_plan_agrees_with_what_is_measured(name):
    row = ROWS[name]
    if row.config.lora.r:
        pytest.importorskip("peft")
    found = in_a_fresh_process(step_peaks, row, GIVEN_BACK)
    planned = memory_of(setup_of_row(row, torch.bfloat16 if isinstance(row, HalfRow) else torch.float32))
    measured = max(found)
    assert abs(planned.peak - measured) <= AGREES * measured, (
        f"planned {planned.peak / MIB:.1f} MiB ({ {part: round(size / MIB, 1) for part, size in planned.parts.items()} }), "
        f"measured {measured / MIB:.1f}"
    )
