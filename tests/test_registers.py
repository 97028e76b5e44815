"""The table of registers in docs/performance.md names every kernel; what it says is checked where the kernels are compiled."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")

from tests import registers
from tests.triton_launches import LAUNCHES

PTXAS = """
ptxas info    : Compiling entry function '_ZN7fastppo4cuda11scan_kernelINS_5FloatELb1EEEvPKf' for 'sm_90'
ptxas info    : Function properties for _ZN7fastppo4cuda11scan_kernelINS_5FloatELb1EEEvPKf
    8 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 1056 bytes smem, 424 bytes cmem[0]
"""


def documented() -> list[tuple[str, str]]:
    text = registers.DOCS.read_text().split(registers.MARKERS[0])[1].split(registers.MARKERS[1])[0]
    return re.findall(r"^\| `(\S+)` \| `(\S+)` \|", text, re.MULTILINE)


def test_the_table_names_every_kernel():
    kernels = {(f"kernels/{stem}.py", name) for stem, name, *_ in LAUNCHES}
    for source in registers.SOURCES:
        names = re.findall(r"__global__.*?\b(\w+_kernel)\(", source.read_text(), re.DOTALL)
        kernels |= {(str(source.relative_to(registers.ROOT)), name) for name in names}
    assert set(documented()) == kernels and len(documented()) == len(kernels), (
        "run python -m tests.registers --write-docs"
    )


def test_every_triton_kernel_is_compiled():
    for path in (registers.ROOT / "kernels").glob("*.py"):
        kernels = re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE)
        assert set(kernels) == {name for stem, name, *_ in LAUNCHES if stem == path.stem}


def test_what_ptxas_says_is_read():
    assert list(registers.ptxas_usages(PTXAS)) == [("scan_kernel", 96, 1056, 20)]


def test_ranges():
    usages = [registers.Usage("a.cu", "k", sm, n, 16 * n, 0) for sm in registers.ARCHITECTURES for n in (8, 4)]
    assert registers.table(usages).splitlines()[-1] == "| `a.cu` | `k` | 2 " + 3 * "| 4-8 / 64-128 " + "|"
