"""On a GPU: each op's own tests on its tensors, and what only a GPU can show: streams, graphs, no waiting, tensors beyond 2^31 elements."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from fastppo import ops
from fastppo.ops._backends import FAST_BACKENDS
from fastppo.rollout import Engine, SamplingParams
from tests.calls import CALLS, LARGE, assert_as_exact, assert_equal, bad_inputs, make_inputs
from tests.rollout.tiny import assert_logprobs_are_the_models, make_model, ragged_prompts
from tests.trainer.steps import Step

ROOT = Path(__file__).resolve().parents[1]
KERNEL_TESTS = [
    *sorted((ROOT / "tests" / "ops").glob("test_*.py")),
    ROOT / "tests" / "rollout" / "test_fused_decoder.py",
]
BUSY_CYCLES = 200_000_000  # a tenth of a second, in which a kernel on another stream would have run too early
QUIET = ("-p", "no:cacheprovider", "-p", "no:xdist")  # of pytest in another process

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]


def backend_of(path: Path) -> str:
    """Of the op that a file in tests/ops tests; other kernels are Triton's."""
    op = max((op for op in FAST_BACKENDS if path.stem.startswith(f"test_{op}")), key=len, default=None)
    return "triton" if op is None else FAST_BACKENDS[op][1]


@pytest.mark.parametrize("path", KERNEL_TESTS, ids=lambda path: path.stem)
def test_kernels_agree_with_their_references(path):
    """A whole test file, in a process whose tensors are on the GPU."""
    environment = os.environ | {
        "FASTPPO_TEST_DEVICE": "cuda",
        "FASTPPO_TEST_BACKEND": backend_of(path),
    }
    command = [sys.executable, "-m", "pytest", *QUIET, str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("call", CALLS)
def test_the_gpu_agrees_with_the_cpu(call):
    """Without a default device: what an op makes for itself is on its inputs' device. Sampled tokens are the CPU's to the last one."""
    found, expected = CALLS[call](make_inputs("cuda")), CALLS[call](make_inputs("cpu"))
    assert all(x.is_cuda for x in found)
    assert_as_exact(call, found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_logits_give_equal_samples(dtype):
    """Of a real vocabulary, and of few tokens, where ties decide."""
    for vocabulary in (151_936, 40):
        logits = (torch.randn(16, vocabulary) * 3).round(decimals=1).to(dtype)
        options = {"temperature": 0.8, "top_k": 100, "top_p": 0.95, "min_p": 0.001, "seed": 7}
        on_gpu, on_cpu = (ops.sample_tokens(x, **options) for x in (logits.cuda(), logits))
        assert torch.equal(on_gpu.tokens.cpu(), on_cpu.tokens)
        assert torch.equal(on_gpu.kept_mass.cpu(), on_cpu.kept_mass)


@pytest.mark.parametrize("call", CALLS)
def test_no_op_waits_for_the_gpu(call):
    inputs = make_inputs("cuda")
    CALLS[call](inputs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        CALLS[call](inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("n", [1, 3])
def test_no_micro_batch_waits_for_the_gpu(n, critic):
    """As `tests/trainer/test_waiting.py` sees it without one."""
    step = Step("llama", n, critic, torch.device("cuda"))
    step.accumulate(step.evaluate())  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.accumulate(step.evaluate())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("call", CALLS)
def test_kernels_run_on_the_current_stream(call):
    """Inputs that a busy stream has yet to write."""
    inputs, others = make_inputs("cuda"), make_inputs("cuda", seed=1)
    expected = CALLS[call](others)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(BUSY_CYCLES)
        for name, x in inputs.items():
            x.copy_(others[name])
        found = CALLS[call](inputs)
    stream.synchronize()
    assert_equal(found, expected)


@pytest.mark.parametrize("call", CALLS)
def test_ops_are_captured_in_graphs(call):
    """A replay computes from what the inputs hold by then."""
    inputs, others = make_inputs("cuda"), make_inputs("cuda", seed=1)
    expected = CALLS[call](others)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = CALLS[call](inputs)
    for name, x in inputs.items():
        x.copy_(others[name])
    graph.replay()
    assert_equal(found, expected)


@pytest.mark.parametrize("call", CALLS)
def test_ops_run_on_their_inputs_device(call):
    """Not on the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    on_each = (CALLS[call](make_inputs(device)) for device in ("cuda:1", "cuda:0"))
    assert_equal(*([x.cpu() for x in outputs] for outputs in on_each))


@pytest.fixture
def memory():
    """Of the GPU, for one test process at a time, and given back to it afterwards."""
    with open(Path(tempfile.gettempdir()) / "fastppo-gpu-memory", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        torch.cuda.empty_cache()
        yield torch.cuda.mem_get_info()[0]
        torch.cuda.empty_cache()


@pytest.mark.parametrize("op", LARGE)
def test_more_than_two_billion_elements(op, memory):
    """Places that 32 bits cannot tell."""
    needed = LARGE[op].bytes << 31
    if memory < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory, there are {memory >> 30}")
    LARGE[op].check(1 << 31, "cuda")


def test_bad_inputs_stay_where_they_are():
    bad_inputs("cuda")
    torch.cuda.synchronize()  # where a fault would show


def sample(model, **options):
    return Engine(model, max_batch_size=options.pop("max_batch_size", 8), **options).generate(
        ragged_prompts(), SamplingParams(n=3, max_new_tokens=20, seed=5)
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mixtral"])
def test_the_engine_samples_what_it_samples_on_a_cpu(family):
    """fp32: through graphs where they can be captured, refilled rows, shared prompts."""
    model = make_model(family)
    expected = sample(model)
    found = sample(model.cuda())
    assert found.tokens.cpu().tolist() == expected.tokens.tolist()
    assert_logprobs_are_the_models(found, model)


@pytest.mark.parametrize("max_batch_size", [1, 5, 15])
def test_samples_do_not_depend_on_the_batch(max_batch_size):
    model = make_model("llama").cuda()
    assert torch.equal(sample(model, max_batch_size=max_batch_size).tokens, sample(model).tokens)


def test_graphs_follow_the_weights():
    model = make_model("llama").cuda()
    engine = Engine(model, max_batch_size=8, keep_cache=True)
    sampling = SamplingParams(n=3, max_new_tokens=20, seed=5)
    engine.generate(ragged_prompts(), sampling)
    graphs = engine.runner.kept_graphs
    assert graphs is not None and graphs._captured, "nothing was captured"
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-1)
    after = engine.generate(ragged_prompts(), sampling)
    assert engine.runner.kept_graphs is graphs
    assert torch.equal(after.tokens, sample(model).tokens)


def test_compute_sanitizer_finds_nothing():
    """In one call of every op, and with bad inputs. Without the caching allocator, in whose blocks a neighbour's memory would be no fault."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("there is no compute-sanitizer on PATH")
    tests = "agrees_with_the_cpu or bad_inputs"
    options = ["--report-api-errors", "no", "--error-exitcode", "9"]  # libraries try calls that a driver may lack
    command = [sanitizer, *options, sys.executable, "-m", "pytest", *QUIET, __file__, "-k", tests]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
