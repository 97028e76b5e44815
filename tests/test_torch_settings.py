"""Nothing depends on what is set for torch as a whole, which belongs to whoever uses fastppo.

The default dtype and device: a thread that loads a model in bf16 changes the one for all others meanwhile, and what a kernel reads or writes
must not become another size. Autocast: ops promise fp32 arithmetic.
"""

from __future__ import annotations

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fastppo import native, ops
from fastppo.native import decoder
from fastppo.ops import use_backend
from fastppo.ops._precision import FullPrecision
from tests.calls import CALLS, assert_equal, make_inputs

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("fastppo/native", "fastppo/ops", "fastppo/reference", "fastppo/model", "fastppo/rollout", "kernels")
FACTORIES = {
    "arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal", "ones", "rand", "randint",
    "randn", "randperm", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip


def careless_allocations(source: str) -> list[int]:
    """Lines that make a tensor from nothing without saying of which dtype and on which device."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        package, _, name = ast.unparse(node.func).rpartition(".")
        named = {keyword.arg for keyword in node.keywords}
        if package == "torch" and name in FACTORIES and not {"dtype", "device"} <= named:
            lines.append(node.lineno)
    return lines


def test_careless_allocations_are_seen():
    source = (
        "torch.empty(3)\ntorch.arange(3, device=d)\nx.new_empty(3)\ntorch.zeros(3, dtype=a, device=b)\ntl.arange(0, 3)"
    )
    assert careless_allocations(source) == [1, 2]


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_allocation_names_its_dtype_and_device(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    careless = [f"{path.name}:{line}" for path in files for line in careless_allocations(path.read_text())]
    assert not careless, f"without dtype and device: {', '.join(careless)}"


@contextmanager
def defaults(dtype: torch.dtype, device: str):
    """torch's default dtype and device are these inside."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(previous)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("around", [lambda: defaults(torch.bfloat16, "meta"), autocast], ids=["defaults", "autocast"])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("call", CALLS)
def test_ops_ignore_what_is_set_around_them(call, backend, around):
    if around is autocast and backend == "reference" and call.startswith("linear_"):
        pytest.skip("its backward pass is autograd's own, which PyTorch asks to be run outside of autocast")
    inputs = make_inputs("cpu")
    with use_backend(backend):
        expected = CALLS[call](inputs)
        with around():
            found = CALLS[call](inputs)
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    assert_equal(found, expected)


def reset_precision() -> None:
    torch.set_float32_matmul_precision("highest")
    torch.backends.mkldnn.matmul.fp32_precision = torch.backends.fp32_precision = "none"


@pytest.fixture
def full_precision_around():
    reset_precision()
    yield
    reset_precision()


# Ways to ask for products of rounded factors, and how to read what was asked for.
REDUCED = {
    "set_float32_matmul_precision": (
        lambda: torch.set_float32_matmul_precision("medium"),
        torch.get_float32_matmul_precision,
    ),
    "oneDNN": (
        lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
        lambda: torch.backends.mkldnn.matmul.fp32_precision,
    ),
    "all": (lambda: setattr(torch.backends, "fp32_precision", "bf16"), lambda: torch.backends.fp32_precision),
}


@pytest.mark.parametrize("way", REDUCED)
@pytest.mark.parametrize("call", ["linear_token_logprobs", "linear_ppo_loss"])
def test_heads_ignore_a_reduced_precision(cpu_backend, full_precision_around, call, way):
    """Which changes products on processors with bf16 instructions."""
    reduce, asked = REDUCED[way]
    inputs = make_inputs("cpu")
    expected = CALLS[call](inputs)
    reduce()
    before = asked(), torch.backends.mkldnn.matmul.fp32_precision
    assert_equal(CALLS[call](inputs), expected)
    assert (asked(), torch.backends.mkldnn.matmul.fp32_precision) == before


class Precision:
    fp32_precision = "bf16"


def test_the_last_thread_gives_the_precision_back():
    matmul = Precision()
    section = FullPrecision(matmul)
    with section:
        with section:
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "ieee", "the other is still inside"
        matmul.fp32_precision = "tf32"  # somebody else, meanwhile
        with section:
            assert matmul.fp32_precision == "ieee"
    assert matmul.fp32_precision == "tf32"
    with section:
        matmul.fp32_precision = "bf16"
    assert matmul.fp32_precision == "bf16", "what was set meanwhile stays"


def test_large_heads_ignore_autocast():
    """Attention over more than the kernels' largest head goes to the reference."""
    q, pages = torch.randn(2, 4, 320), torch.randn(2, 4, 16, 2, 320)
    table, lens = torch.tensor([[0, 1], [2, 3]]), torch.tensor([32, 20])
    expected = ops.decode_attention(q, *pages, table, lens)
    with autocast():
        assert torch.equal(ops.decode_attention(q, *pages, table, lens), expected)


def tiny_layer() -> decoder.Layer:
    """Of hidden size 8, with two heads of size 4."""
    norm, none = decoder.Norm(torch.ones(8), 1e-6), decoder.Norm(None, 0.0)
    shapes = [(8, 8)] * 4 + [(16, 8), (16, 8), (8, 16)]  # q, k, v, o, gate, up, down
    linears = tuple(decoder.Linear(torch.randn(shape), None) for shape in shapes)
    pages = [torch.zeros(4, 16, 2, 4) for _ in range(2)]
    return decoder.Layer((norm, none, none, norm), linears, *pages, scale=0.5, window=None)


def test_the_native_decoder_ignores_the_defaults():
    """Its memory was once as large as the default dtype made it: the kernels wrote behind its end."""
    if native.unavailable_reason:
        pytest.skip(native.unavailable_reason)
    layer, embedding, cos, sin = tiny_layer(), torch.randn(11, 8), torch.randn(64, 4), torch.randn(64, 4)
    lengths, table = torch.tensor([4, 6]), torch.tensor([[2], [3]], dtype=torch.int32)

    def run() -> list[torch.Tensor]:
        made = decoder.Decoder([layer], embedding, layer.norms[0], cos, sin, rows=2)
        assert made._hidden.dtype == made._scratch.dtype == torch.float32
        prefilled = made.prefill([[1, 2, 3], [4, 5, 6, 7, 8]], [[2], [3]], [0, 0])
        return [prefilled, made.step(torch.tensor([9, 10], dtype=torch.int64, device="cpu"), lengths, table).clone()]

    expected = run()
    with defaults(torch.bfloat16, "meta"):
        assert_equal(run(), expected)
