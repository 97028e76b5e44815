"""Large new memory is asked for in huge pages, of which it takes far fewer faults to fill it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fastppo import native, token_logprobs

pytestmark = [
    pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="needs Linux with huge pages"),
    pytest.mark.skipif(native._C is None, reason="the C++ kernels are not built"),
]
LARGE = native.MAPPED_BYTES // 4 + 4096  # fp32


def flags_at(address: int) -> list[str]:
    """Of the mapping that holds an address, as the kernel names them."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping holds {address:x}")


def middle_of(x: torch.Tensor) -> int:
    return x.data_ptr() + x.nbytes // 2


def test_large_memory_is_asked_for_in_huge_pages():
    plain, advised = torch.empty(LARGE), native.on_huge_pages(torch.empty(LARGE))
    assert "hg" in flags_at(middle_of(advised)) and "hg" not in flags_at(middle_of(plain))


def test_small_memory_stays_as_it_is():
    """It lies in the heap, whose mapping is to stay one piece."""
    assert "hg" not in flags_at(middle_of(native.on_huge_pages(torch.empty(1 << 20))))


def test_the_gradient_of_logits_has_them():
    logits = torch.zeros(2, LARGE, requires_grad=True)
    token_logprobs(logits, torch.tensor([0, 1])).sum().backward()
    assert "hg" in flags_at(middle_of(logits.grad))
