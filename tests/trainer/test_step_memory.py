"""What saves memory does, by measured peaks: adapters, gradient checkpointing, heads that never hold whole logits."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import replace

import pytest
import torch

from fastppo.bench.memory import CLEAR_REFS
from fastppo.bench.step_memory import CONFIG, LORA, M_MMAP_THRESHOLD, MIB, SHARED, Row, checkpointing, step_peaks
from fastppo.ops._head import SIZES
from tests.fresh import in_a_fresh_process

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not CLEAR_REFS.exists(), reason="peaks are read as on Linux")

GIVEN_BACK = 64 << 10  # small networks are made of smaller tensors, whose holes in the heap would be most of a peak


def peaks(row: Row) -> tuple[int, int]:
    """Bytes of a rollout, and of scoring and updates."""
    return tuple(in_a_fresh_process(step_peaks, row, GIVEN_BACK))


def after_much_was_freed(row: Row) -> list[int]:
    """The peaks of a process whose heap holds 80 MiB of free pages, as that of a whole test session does."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MIB)
    *freed, last = [torch.ones(MIB // 8) for _ in range(160)]
    del freed
    return step_peaks(row)


def test_free_pages_of_the_heap_hide_no_peak():
    row = Row("", SHARED, vocabulary=256, hidden=64, layers=12, prompts=8, new_tokens=16)
    alone, after = (in_a_fresh_process(measure, row) for measure in (step_peaks, after_much_was_freed))
    assert min(after) > 0.9 * min(alone) > MIB, (after, alone)


def test_a_step_of_adapters_needs_less_than_45_percent():
    """Of the memory of a step that trains all weights of policy and critic beside a reference."""
    pytest.importorskip("peft")
    size = {"hidden": 256, "layers": 4, "prompts": 8, "new_tokens": 8}
    full, lora = (max(peaks(Row("", config, **size))) for config in (CONFIG, LORA))
    assert 0 < lora <= 0.45 * full, (lora / MIB, full / MIB)


@pytest.mark.parametrize("config", [SHARED, LORA], ids=["all weights", "adapters"])
def test_gradient_checkpointing_keeps_less(config):
    """On the kernels of a Llama-like model; what is left of activations is one layer's, and two states of each."""
    if config is LORA:
        pytest.importorskip("peft")
    size = {"vocabulary": 256, "hidden": 64, "layers": 12, "prompts": 32, "new_tokens": 48}
    config = replace(config, learner=replace(config.learner, num_minibatches=1))
    kept, again = (peaks(Row("", each, **size))[1] for each in (config, checkpointing(config)))
    assert again < 0.6 * kept, (again / MIB, kept / MIB)


def test_a_large_vocabulary_costs_its_head_and_a_bounded_chunk():
    """Not the logits of all tokens, which would be eight times as much as the chunk."""
    size = {"hidden": 32, "layers": 1, "prompts": 16, "new_tokens": 32}
    small, large = (peaks(Row("", SHARED, vocabulary, **size))[1] for vocabulary in (1 << 10, 1 << 17))
    head = 32 * 4 * ((1 << 17) - (1 << 10))
    # Policy and reference, two gradients of the tied weight on their way into one, and AdamW's two moments.
    chunk = SIZES["cpu"].logits_bytes
    assert 16 * 32 * 4 << 17 == 8 * chunk
    assert 0 < large - small <= 6 * head + chunk, ((large - small) / MIB, head / MIB)
