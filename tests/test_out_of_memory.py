"""Where memory runs out inside the threads of a kernel, the call raises MemoryError; it does not end the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastppo import native

ROOT = Path(__file__).resolve().parents[1]

# Of each op whose kernel allocates in its threads: `call` on inputs for which that is much more than `spare` bytes, which are the outputs and little
# else; `warm_up` starts the threads.
CALLS = {
    "sample_tokens": """
logits = torch.zeros(4, 1 << 21)
logits[:, ::2] = 1e-6
def call(x): return ops.sample_tokens(x, top_p=0.9, seed=0, sequence_ids=torch.arange(len(x)))
inputs, few, spare = (logits,), (logits[:, :100],), 0
""",
    "decode_attention": """
q, pages, table = torch.zeros(4, 1 << 18, 16), torch.zeros(2, 1, 16, 1, 16), torch.zeros(4, 1, dtype=torch.int32)
lens = torch.full((4,), 16, dtype=torch.int32)
def call(q): return ops.decode_attention(q, *pages, table, lens)
inputs, few, spare = (q,), (q[:, :1 << 10],), q.nbytes
""",
}
RUN = """
import resource
import torch
from fastppo import ops
torch.set_num_threads({threads})
{call}
call(*few)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + spare + (8 << 20),) * 2)
try:
    call(*inputs)
except MemoryError:
    print("MemoryError")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a process's memory is limited and looked up as on Linux")
@pytest.mark.skipif(native.unavailable_reason is not None, reason=str(native.unavailable_reason))
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("op", CALLS)
def test_no_memory_for_a_kernels_threads(op, threads):
    code = RUN.format(call=CALLS[op], threads=threads)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "MemoryError"), done.stderr[-2000:]
