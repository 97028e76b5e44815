"""Builds `fastppo._C` with ninja and pybind11: every CPU kernel for each instruction set, and the CUDA kernels where nvcc is.

Everything else about the package stands in pyproject.toml. Environment:

    FASTPPO_CUDA=0|1                 never build the CUDA kernels | fail when they cannot be built (default: build them when nvcc is found)
    FASTPPO_CUDA_ARCHS="80;90;100"   compute capabilities to build for
    CXX, NVCC                        the compilers
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
X86_ISAS = {
    "plain": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512",
}
# -ffp-contract=off: the same bits on every instruction set (csrc/cpu/simd.h). -fno-trapping-math lets comparisons vectorise. -falign-loops: a
# loop of eight instructions loses a sixth of its speed where it straddles two lines, and any change before it moves it.
CXX_FLAGS = "-std=c++17 -O3 -falign-loops=64 -fPIC -fopenmp -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wno-psabi"


def find_nvcc() -> str | None:
    """The nvcc to use, or None when CUDA is switched off or absent; an error when it was asked for and is absent."""
    wanted = os.environ.get("FASTPPO_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"FASTPPO_CUDA is {wanted!r}, expected 0 or 1")
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if wanted == "1" and not nvcc:
        raise SystemExit("FASTPPO_CUDA=1 but nvcc was not found; put it on PATH or set NVCC")
    return None if wanted == "0" else nvcc


def cuda_archs(nvcc: str) -> list[str]:
    """Compute capabilities to build for: those asked for, or of 80, 90 and 100 the ones that nvcc knows."""
    asked = os.environ.get("FASTPPO_CUDA_ARCHS")
    if asked is None:
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
        return [arch for arch in ("80", "90", "100") if f"sm_{arch}" in known] or ["80"]
    if not all(arch.isdigit() for arch in asked.split(";")):
        raise SystemExit(f"FASTPPO_CUDA_ARCHS is {asked!r}, expected numbers such as '80;90;100'")
    return asked.split(";")


def cuda_flags(nvcc: str) -> str:
    archs = cuda_archs(nvcc)
    # Machine code for each, and intermediate code of the newest for chips that are newer still.
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    return f"-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall --cudart=static {' '.join(targets)}"


def ninja_file(out: Path, build: Path, nvcc: str | None) -> str:
    """The build.ninja text: one edge for each (source, instruction set), one link."""
    import sysconfig

    import pybind11

    includes = f"-I{sysconfig.get_path('include')} -I{pybind11.get_include()}"
    isas = X86_ISAS if platform.machine() in ("x86_64", "AMD64") else {"plain": ""}
    cxx = os.environ.get("CXX", "g++")
    lines = [
        f"builddir = {build}",
        f"rule cxx\n  command = {cxx} -MMD -MF $out.d {CXX_FLAGS} $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
    ]
    objects = [build / "bindings.o"]
    define = " -DFASTPPO_HAS_CUDA" if nvcc else ""
    lines.append(f"build {objects[0]}: cxx {CSRC / 'bindings.cpp'}\n  flags = {includes}{define}")
    # `plain` objects come first: should the linker merge an inline function, the version that runs everywhere wins.
    for isa, flags in isas.items():
        for source in sorted(CSRC.glob("cpu/*.cpp")):
            objects.append(build / f"{source.stem}.{isa}.o")
            lines.append(f"build {objects[-1]}: cxx {source}\n  flags = {flags} -DFASTPPO_ISA={isa}")
    link = f"{cxx} -shared -fopenmp -s $in -o $out"
    if nvcc:
        nvcc_flags = cuda_flags(nvcc)
        # nvcc links too: it knows where its runtime library is.
        link = f"{nvcc} {nvcc_flags} -shared -Xcompiler -fopenmp -Xlinker -s $in -o $out"
        lines.append(
            f"rule nvcc\n  command = {nvcc} -MD -MF $out.d {nvcc_flags} $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc"
        )
        for source in [CSRC / "cuda" / "bindings.cpp", *sorted(CSRC.glob("cuda/*.cu"))]:
            objects.append(build / f"{source.stem}.cuda.o")
            lines.append(f"build {objects[-1]}: nvcc {source}\n  flags = {includes if source.suffix == '.cpp' else ''}")
    lines.append(f"rule link\n  command = {link}")
    lines.append(f"build {out}: link {' '.join(map(str, objects))}")
    return "\n\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """Runs ninja. What cannot be built is left out with a warning: the CUDA kernels, unless FASTPPO_CUDA=1 asked for them, or all."""

    def build_extension(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        try:
            self.run_ninja(ext, nvcc)
            return
        except (OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("FASTPPO_CUDA") == "1":
                raise
            failure = error
        if nvcc:
            warn(f"fastppo's CUDA kernels were not built ({failure}). Set FASTPPO_CUDA=1 to make this an error.")
            try:
                self.run_ninja(ext, None)
                return
            except (OSError, subprocess.CalledProcessError) as error:
                failure = error
        warn(
            f"fastppo's C++ kernels were not built ({failure}).\n"
            "fastppo still installs and computes everything in plain PyTorch, slower. "
            "Install a C++17 compiler (g++ >= 11) and install fastppo again for the kernels."
        )

    def run_ninja(self, ext: Extension, nvcc: str | None) -> None:
        import ninja

        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / "kernels"  # the same for every way to install, so that a wheel reuses what is built
        build.mkdir(parents=True, exist_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(out, build, nvcc))
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-f", str(build / "build.ninja")]
        subprocess.run(command, check=True)


def warn(text: str) -> None:
    print(f"\nWARNING: {text}\n", file=sys.stderr)


# `optional`: setuptools must not fail on a kernel library that could not be built.
setup(ext_modules=[Extension("fastppo._C", sources=[], optional=True)], cmdclass={"build_ext": NinjaBuild})
