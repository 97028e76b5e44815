"""Compiles csrc/cuda with g++ against the emulator and loads the result: `python -m tests.cuda_on_cpu.build` does the first alone."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import ninja
import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NAME = "fastppo_cuda_on_cpu"
CXX = os.environ.get("CXX", "g++")

# -ftrivial-auto-var-init: a local variable read before it is written holds garbage that no test can miss.
FLAGS = (
    "-std=c++17 -O1 -g1 -fPIC -fvisibility=hidden -ffp-contract=off -fno-gnu-unique -fcf-protection=none"
    " -ftrivial-auto-var-init=pattern -Wall -Wno-unknown-pragmas -Wno-unused-function -Wno-psabi"
)
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
# `static` locals of kernels: with `__shared__` defined so, these and nothing else are shared memory.
SHARED_SYMBOL = re.compile(r"^([0-9a-f]+) ([0-9a-f]+) [bBdDuV] _ZZN7fastppo4cuda")


def build(sanitize: bool = False) -> Path:
    """The extension module's path, compiled where a source is newer."""
    folder = ROOT / "build" / ("cuda_on_cpu_sanitized" if sanitize else "cuda_on_cpu")
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes in parallel
        (folder / "build.ninja").write_text(_ninja_file(folder, library, sanitize))
        command = [Path(ninja.BIN_DIR) / "ninja", "-f", folder / "build.ninja"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the emulated kernels do not compile:\n{done.stdout[-6000:]}")
    return library


def _ninja_file(folder: Path, library: Path, sanitize: bool) -> str:
    kernels = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), HERE / "faults.cu"]
    others = [ROOT / "csrc" / "cuda" / "bindings.cpp", HERE / "module.cpp", HERE / "emulator.cpp"]
    includes = f"-I{HERE} -I{sysconfig.get_path('include')} -I{pybind11.get_include()}"
    compile_rule = f"{CXX} -MMD -MF $out.d {FLAGS} {includes} $flags -x c++ -c $in -o $out"
    link_rule = f"{CXX} -shared {SANITIZERS if sanitize else ''} $in -o $out"
    lines = [
        f"builddir = {folder}",
        f"rule cxx\n  command = {compile_rule}\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {link_rule}",
    ]
    objects = []
    for source in (*kernels, *others):
        # The bindings' own code is not what is looked at, and pybind11's templates compile slowly with the sanitizers.
        sanitized = sanitize and (source.suffix == ".cu" or source.stem == "emulator")
        objects.append(folder / f"{source.stem}{source.suffix}.o")
        lines.append(f"build {objects[-1]}: cxx {source}\n  flags = {SANITIZERS if sanitized else ''}")
    lines.append(f"build {library}: link {' '.join(map(str, objects))}\ndefault {library}")
    return "\n\n".join(lines) + "\n"


def load(library: Path) -> ModuleType:
    """The module, its kernels' shared memory made known to the emulator."""
    spec = importlib.util.spec_from_file_location(NAME, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    symbols = subprocess.run(["nm", "-S", library], capture_output=True, text=True, check=True).stdout
    found = (SHARED_SYMBOL.match(line) for line in symbols.splitlines())
    module.set_shared_variables([(int(match[1], 16), int(match[2], 16)) for match in found if match])
    return module


if __name__ == "__main__":
    print(build())
