"""Peak memory of one provider's call beyond its inputs and its outputs, measured in a process of its own.

`python -m fastppo.bench.memory` reads a request a line, JSON [op, index, setting, providers], and answers each with a line of the peaks.
On the CPU a call on the case's quick inputs loads code and threads (of compiled code, a call on the full ones), then the full inputs are
made, the heap is trimmed and the kernel's high-water mark is reset (`/proc/self/clear_refs`). After the call, VmHWM - VmRSS
before it - bytes of the outputs is the answer: pages really touched, by whatever allocator. On a GPU it is the same
difference of torch's allocator statistics, which need no fresh process.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from fastppo.bench.harness import Case, Provider, Tensors, describe, make_inputs, prepared
from fastppo.bench.peers import COMPILING
from fastppo.bench.setting import Setting

Measured = TypeVar("Measured", int, list[int])  # bytes

CPU = torch.device("cpu")
TIMEOUT_SECONDS = 300
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_HIGH_WATER_MARK = "5"


class CannotMeasure(Exception):
    """This machine, or this provider, gives no peak."""


def status_bytes(key: str) -> int:
    """A size such as VmHWM or VmRSS of this process."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) << 10


def output_bytes(outputs: Tensors, inputs: Tensors) -> int:
    """Bytes of the outputs' storages, each once, without those that the caller had given."""
    given = {x.untyped_storage().data_ptr() for x in inputs.values()}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in outputs.values()}
    return sum(size for pointer, size in storages.items() if pointer not in given)


def trim_heap() -> None:
    """Give back the free pages that earlier calls left in glibc's heap: they would hide those of what is measured next."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def cpu_peak(run: Provider, inputs: Tensors) -> int:
    try:
        trim_heap()
        CLEAR_REFS.write_text(RESET_HIGH_WATER_MARK)
    except (OSError, AttributeError) as error:
        raise CannotMeasure(
            f"peak memory is measured on Linux with glibc and a writable {CLEAR_REFS}: {error}"
        ) from error
    before = status_bytes("VmRSS")
    outputs = run(inputs)
    return max(0, status_bytes("VmHWM") - before - output_bytes(outputs, inputs))


def cuda_peak(run: Provider, inputs: Tensors) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = run(inputs)
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before - output_bytes(outputs, inputs))


def peak_bytes(case: Case, quick_case: Case, provider: str) -> int:
    """The peak of `provider` on `case`, in this process; `quick_case` is the same case at its small size.

    What was compiled for the small size would be compiled again.
    """
    warm_up = case if provider in COMPILING else quick_case
    warm_up.providers[provider](prepared(warm_up, provider, make_inputs(warm_up, CPU)))
    return cpu_peak(case.providers[provider], prepared(case, provider, make_inputs(case, CPU)))


class PeakProcess:
    """Measures peaks on the CPU: it has imported what there is, called nothing, and forks for every provider that it is asked about."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._errors = tempfile.TemporaryFile("w+")

    def __enter__(self) -> PeakProcess:
        return self

    def __exit__(self, *_) -> None:
        if self._process is not None:
            self._process.communicate()

    def measure(self, op: str, setting: Setting, index: int, providers: list[str]) -> dict[str, int | str]:
        """`peak_bytes` of each provider, or why there is none; raises CannotMeasure where nothing was measured at all."""
        request = op, index, {"sizes": setting.sizes, "dtype": setting.dtype}, providers
        if self._process is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
            self._process = subprocess.Popen([sys.executable, "-m", "fastppo.bench.memory"], text=True, **pipes)
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self._process.stdin, flush=True)
        if answer := self._process.stdout.readline():
            return json.loads(answer)
        raise CannotMeasure(self._last_words())

    def _last_words(self) -> str:
        status, self._process = self._process.wait(), None
        self._errors.seek(0)
        return (self._errors.read().strip().splitlines() or [f"exit status {status}"])[-1]


def in_a_child(measure: Callable[[], Measured]) -> Measured | str:
    """What `measure` gives in a forked process, which has all that this one has imported and nothing that a call has touched; or why none."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(TIMEOUT_SECONDS)
        try:
            answer: Measured | str = measure()
        except Exception as error:
            answer = describe(error)
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGALRM:
        return f"took more than {TIMEOUT_SECONDS} s"
    return json.loads(text) if text else f"its process ended with status {status}"


def answer(op: str, index: int, asked: dict, providers: list[str]) -> dict[str, int | str]:
    from fastppo.bench.catalog import load_cases

    setting = Setting(**asked)
    case, quick_cases = load_cases(op, setting)[index], load_cases(op, Setting(quick=True, dtype=setting.dtype))
    quick_case = quick_cases[index % len(quick_cases)]
    case.imports()
    return {name: in_a_child(partial(peak_bytes, case, quick_case, name)) for name in providers}


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whoever prints, prints elsewhere
    for request in sys.stdin:
        print(json.dumps(answer(*json.loads(request))), file=answers, flush=True)


if __name__ == "__main__":
    main()
