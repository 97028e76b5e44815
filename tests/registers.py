"""What every kernel takes of a multiprocessor, as the compilers for each kind of GPU say: `python -m tests.registers [--write-docs]`.

No GPU is needed: Triton and nvcc compile for one that is not there.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

# Triton is imported where it compiles: the CUDA kernels are checked without it.

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
DOCS = ROOT / "docs" / "performance.md"
MARKERS = ("<!-- registers: begin -->\n", "<!-- registers: end -->\n")
ARCHITECTURES = {
    80: 166912,
    90: 232448,
    100: 232448,
}  # compute capability: most bytes of shared memory a block can have


class Usage(NamedTuple):
    """Of one compiled kernel."""

    source: str
    kernel: str
    capability: int
    registers: int
    shared: int
    """Bytes; of a CUDA kernel without what is asked for at its launch."""
    local: int
    """Bytes of the stack and of spilled registers."""


def triton_usage(launch: tuple, capability: int, folder: Path) -> Usage:
    """Of one launch of tests/triton_launches.py; `folder` takes the cubin."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    stem, name, signature, constants, warps, *stages = launch
    kernel = getattr(importlib.import_module(f"fastppo.kernels.{stem}"), name)
    types = {argument: spec.split(":")[0] for argument, spec in signature.items()}
    types |= dict.fromkeys(constants, "constexpr")
    places = [place for place, argument in enumerate(kernel.arg_names) if signature.get(argument, "").endswith(":16")]
    source = ASTSource(kernel, types, constants, {(place,): [["tt.divisibility", 16]] for place in places})
    options = {"num_warps": warps} | ({"num_stages": stages[0]} if stages else {})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    used = cubin_usage(cubin)
    local = used["STACK"] + used["LOCAL"]
    return Usage(f"kernels/{stem}.py", name, capability, used["REG"], compiled.metadata.shared, local)


def cubin_usage(cubin: Path) -> dict[str, int]:
    """What Triton's own cuobjdump says of a cubin: REG, STACK, SHARED, LOCAL."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [cuobjdump, "--dump-resource-usage", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def find_nvcc() -> str | None:
    return os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def cuda_usages(nvcc: str, source: Path, capability: int, folder: Path) -> list[Usage]:
    """Of every kernel in a file of csrc/cuda, each instance of a template; RuntimeError where it does not compile."""
    command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{capability}", "-cubin", "-Xptxas", "-v", source]
    done = subprocess.run([*command, "-o", folder / "kernels.cubin"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile for sm_{capability}:\n{done.stderr}")
    file = str(source.relative_to(ROOT))
    return [Usage(file, name, capability, *numbers) for name, *numbers in ptxas_usages(done.stderr)]


def ptxas_usages(log: str) -> Iterator[tuple[str, int, int, int]]:
    """(kernel, registers, shared, local) of each kernel in what `ptxas -v` says."""
    for part in log.split("Compiling entry function")[1:]:

        def number(pattern: str, part: str = part) -> int:
            match = re.search(pattern, part)
            return int(match[1]) if match else 0

        local = [r"(\d+) bytes stack frame", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads"]
        name = re.search(r"'\w*?\d([a-z][a-z_]*_kernel)", part)[1]  # a length stands before each name in the symbol
        yield name, number(r"Used (\d+) registers"), number(r"(\d+) bytes smem"), sum(map(number, local))


def all_usages(nvcc: str) -> Iterator[Usage]:
    from tests.triton_launches import LAUNCHES

    with tempfile.TemporaryDirectory() as name:
        for capability in ARCHITECTURES:
            yield from (triton_usage(launch, capability, Path(name)) for launch in LAUNCHES)
            for source in SOURCES:
                yield from cuda_usages(nvcc, source, capability, Path(name))


def span(values: Iterable[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low}-{high}"


def table(usages: list[Usage]) -> str:
    """A line a kernel: how often it was compiled (for types, options and tiles), and the range of what that took on each architecture."""
    columns = [f"sm_{capability}: registers / shared bytes" for capability in ARCHITECTURES]
    lines = [f"| source | kernel | compiled | {' | '.join(columns)} |", f"|{'---|' * (3 + len(columns))}"]
    for source, kernel in dict.fromkeys((usage.source, usage.kernel) for usage in sorted(usages)):
        cells = []
        for capability in ARCHITECTURES:
            found = [usage for usage in usages if usage[:3] == (source, kernel, capability)]
            cells.append(f"{span([u.registers for u in found])} / {span([u.shared for u in found])}")
        lines.append(f"| `{source}` | `{kernel}` | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_docs(text: str) -> None:
    """Replaces what stands between the markers in docs/performance.md."""
    before, rest = DOCS.read_text().split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    DOCS.write_text(before + MARKERS[0] + text + MARKERS[1] + after)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.registers", description=__doc__)
    parser.add_argument("--write-docs", action="store_true", help=f"write the table into {DOCS.relative_to(ROOT)}")
    options = parser.parse_args(argv)
    nvcc = find_nvcc()
    if nvcc is None:
        parser.error("nvcc was not found; put it on PATH or set NVCC")
    text = table(list(all_usages(nvcc)))
    print(text, end="")
    if options.write_docs:
        write_docs(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
