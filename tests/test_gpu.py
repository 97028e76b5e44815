"""On a GPU: each op's own tests on its tensors, and what only a GPU can show: streams, graphs, no waiting, tensors beyond 2^31 elements."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastppo import ops
from fastppo.ops._backends import FAST_BACKENDS
from fastppo.rollout import Engine, SamplingParams
from tests.rollout.tiny import make_model, ragged_prompts

ROOT = Path(__file__).resolve().parents[1]
OP_TESTS = sorted((ROOT / "tests" / "ops").glob("test_*.py"))
BUSY_CYCLES = 200_000_000  # a tenth of a second, in which a kernel on another stream would have run too early
Run = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]


def backend_of(stem: str) -> str:
    op = max((op for op in FAST_BACKENDS if stem.startswith(op)), key=len)
    return FAST_BACKENDS[op][1]


@pytest.mark.parametrize("path", OP_TESTS, ids=lambda path: path.stem)
def test_ops_agree_with_their_references(path):
    """The op's whole test file, in a process whose tensors are on the GPU."""
    environment = os.environ | {
        "FASTPPO_TEST_DEVICE": "cuda",
        "FASTPPO_TEST_BACKEND": backend_of(path.stem.removeprefix("test_")),
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n0", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


# ---- one call of every op, for what follows


def make_inputs(device: str, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens, vocab, hidden = 96, 1000, 64

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inputs = {
        "logits": noise(tokens, vocab),
        "hidden": noise(tokens, hidden),
        "weight": noise(vocab, hidden) / 8,
        "labels": torch.randint(vocab, (tokens,), generator=generator),
        "logprobs": -noise(tokens).abs(),
        "old_logprobs": -noise(tokens).abs(),
        "advantages": noise(tokens),
        "rewards": noise(8, 12),
        "values": noise(8, 12),
        "mask": torch.rand(tokens, generator=generator) < 0.8,
        "q": noise(4, 6, 32),
        "pages": noise(2, 9, 64, 2, 32),
        "block_table": torch.randperm(8, generator=generator).view(4, 2).int(),
        "context_lens": torch.tensor([1, 64, 100, 128], dtype=torch.int32),
    }
    return {name: x.to(device) for name, x in inputs.items()}


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


def run_token_logprobs(x):
    logits = x["logits"].detach().requires_grad_()
    logprobs, entropy = ops.token_logprobs(logits, x["labels"], return_entropy=True)
    return logprobs.detach(), entropy.detach(), *gradients((logprobs * x["advantages"] + entropy).sum(), logits)


def run_linear_token_logprobs(x):
    hidden, weight = x["hidden"].detach().requires_grad_(), x["weight"].detach().requires_grad_()
    logprobs = ops.linear_token_logprobs(hidden, weight, x["labels"])
    return logprobs.detach(), *gradients((logprobs * x["advantages"]).sum(), hidden, weight)


def run_linear_ppo_loss(x):
    hidden, weight = x["hidden"].detach().requires_grad_(), x["weight"].detach().requires_grad_()
    loss = ops.linear_ppo_loss(hidden, weight, x["labels"], x["old_logprobs"], x["advantages"], x["mask"]).loss
    return loss.detach(), *gradients(loss, hidden, weight)


def run_ppo_loss(x):
    logprobs = x["logprobs"].detach().requires_grad_()
    loss = ops.ppo_loss(logprobs, x["old_logprobs"], x["advantages"], x["mask"]).loss
    return loss.detach(), *gradients(loss, logprobs)


def run_sample_tokens(x):
    streams = {"seed": 3, "sequence_ids": x["labels"], "positions": x["labels"]}
    return tuple(ops.sample_tokens(x["logits"], top_k=50, top_p=0.9, **streams))


def run_decode_attention(x):
    return (ops.decode_attention(x["q"], *x["pages"], x["block_table"], x["context_lens"]),)


CALLS: dict[str, Run] = {
    "token_logprobs": run_token_logprobs,
    "linear_token_logprobs": run_linear_token_logprobs,
    "linear_ppo_loss": run_linear_ppo_loss,
    "gae": lambda x: tuple(ops.gae(x["rewards"], x["values"], gamma=0.99, lam=0.95)),
    "masked_whiten": lambda x: (ops.masked_whiten(x["advantages"], x["mask"]),),
    "approx_kl": lambda x: (ops.approx_kl(x["logprobs"], x["old_logprobs"]),),
    "ppo_loss": run_ppo_loss,
    "sample_tokens": run_sample_tokens,
    "decode_attention": run_decode_attention,
    "batch_invariant_linear": lambda x: (ops.batch_invariant_linear(x["hidden"], x["weight"]),),
}


def assert_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_every_op_is_called():
    assert CALLS.keys() == FAST_BACKENDS.keys()


@pytest.mark.parametrize("op", CALLS)
def test_the_gpu_agrees_with_the_cpu(op):
    """Without a default device: what an op makes for itself is on its inputs' device. Sampled tokens are the CPU's to the last one."""
    found, expected = CALLS[op](make_inputs("cuda")), CALLS[op](make_inputs("cpu"))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.is_cuda
        torch.testing.assert_close(ours.cpu(), theirs, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("op", CALLS)
def test_no_op_waits_for_the_gpu(op):
    inputs = make_inputs("cuda")
    CALLS[op](inputs)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        CALLS[op](inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", CALLS)
def test_kernels_run_on_the_current_stream(op):
    """Inputs that a busy stream has yet to write."""
    inputs, others = make_inputs("cuda"), make_inputs("cuda", seed=1)
    expected = CALLS[op](others)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(BUSY_CYCLES)
        for name, x in inputs.items():
            x.copy_(others[name])
        found = CALLS[op](inputs)
    stream.synchronize()
    assert_equal(found, expected)


@pytest.mark.parametrize("op", CALLS)
def test_ops_are_captured_in_graphs(op):
    """A replay computes from what the inputs hold by then."""
    inputs, others = make_inputs("cuda"), make_inputs("cuda", seed=1)
    expected = CALLS[op](others)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = CALLS[op](inputs)
    for name, x in inputs.items():
        x.copy_(others[name])
    graph.replay()
    assert_equal(found, expected)


def test_more_than_two_billion_logits():
    """The last rows lie beyond what 32 bits can address."""
    vocab, rows = 151_936, (1 << 31) // 151_936 + 3
    if torch.cuda.mem_get_info()[0] < 3 * rows * vocab * 2:
        pytest.skip("too little memory")
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    logits[-2:].normal_()
    labels = torch.full((rows,), vocab - 1, device="cuda")
    found = ops.token_logprobs(logits.requires_grad_(), labels)
    expected = ops.token_logprobs(logits[-2:].detach(), labels[-2:])
    assert torch.equal(found[-2:].detach(), expected)
    (gradient,) = torch.autograd.grad(found[-2:].sum(), logits)
    assert gradient[-2:].float().sum(-1).abs().max() < 1e-1 and gradient[-1, -1] > 0.5
    sampled = ops.sample_tokens(logits.detach(), seed=1, sequence_ids=labels, positions=labels)
    assert (sampled.tokens >= 0).all() and (sampled.tokens < vocab).all()


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
    torch.testing.assert_close(found.logprobs.cpu(), expected.logprobs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("max_batch_size", [1, 5, 15])
def test_samples_do_not_depend_on_the_batch(max_batch_size):
    model = make_model("llama").cuda()
    assert torch.equal(sample(model, max_batch_size=max_batch_size).tokens, sample(model).tokens)


def test_graphs_follow_the_weights():
    model = make_model("llama").cuda()
    engine = Engine(model, max_batch_size=8, keep_cache=True)
    sampling = SamplingParams(n=3, max_new_tokens=20, seed=5)
    engine.generate(ragged_prompts(), sampling)
    graphs = engine._graphs
    assert graphs is not None and graphs._captured, "nothing was captured"
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-1)
    after = engine.generate(ragged_prompts(), sampling)
    assert engine._graphs is graphs
    assert torch.equal(after.tokens, sample(model).tokens)


def test_bad_input_stays_in_its_row():
    """Labels, pages and slots out of range give NaN, or nothing, for their row alone; the device is usable afterwards."""
    x = make_inputs("cuda")
    labels = x["labels"].clone()
    labels[3], labels[5] = 10**12, -5
    logprobs = ops.token_logprobs(x["logits"], labels)
    assert logprobs.isnan().nonzero().flatten().tolist() == [3, 5]
    table = x["block_table"].clone()
    table[2, 0] = 1 << 30
    out = ops.decode_attention(x["q"], *x["pages"], table, x["context_lens"])
    assert out[2].isnan().all() and out[[0, 1, 3]].isfinite().all()
    slots = torch.tensor([10**12, 5, -1, 9 * 64], device="cuda")
    pages = x["pages"].clone()
    ops.write_kv(torch.ones(4, 2, 32, device="cuda"), torch.ones(4, 2, 32, device="cuda"), *pages, slots)
    assert int((pages != x["pages"]).any(-1).any(-1).sum()) == 2
    torch.cuda.synchronize()


def test_memory_is_sound():
    """compute-sanitizer watches one call of every op and the bad input."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        pytest.skip("there is no compute-sanitizer")
    tests = "agrees_with_the_cpu or bad_input"
    command = [tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-n0", "-q", __file__, "-k", tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:]
