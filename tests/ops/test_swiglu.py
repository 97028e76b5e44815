"""`swiglu` against fp64: values and gradients, odd shapes, strides, numbers whose exponential is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastppo.ops import swiglu
from fastppo.reference.swiglu import swiglu as reference
from tests.cases import DTYPES, seeded, strided_views, with_threads
from tests.isa import assert_same_bits_on_every_isa
from tests.tolerance import assert_as_exact_as_native, assert_rounds_to

# One element, tails of the lanes and of the 1024-element block, several blocks, nothing.
SHAPES = [(), (1,), (17,), (3, 7, 11), (1023,), (5, 252), (33, 100), (0,), (4, 0)]


def make_case(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = seeded(sum(shape))
    return tuple((torch.randn(shape, generator=generator) * 3).to(dtype) for _ in range(2))


def run(function, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    """The result and both gradients."""
    leaves = [x.detach().requires_grad_() for x in (gate, up)]
    out = function(*leaves)
    upstream = torch.randn(gate.shape, generator=seeded(3)).to(gate.dtype)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


def compare(gate: Tensor, up: Tensor) -> None:
    ours, native, exact = run(swiglu, gate, up), run(reference, gate, up), run(reference, gate.double(), up.double())
    for name, a, b, c in zip(("output", "d_gate", "d_up"), ours, native, exact, strict=True):
        assert a.dtype == gate.dtype
        assert_as_exact_as_native(a, b, c, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend, shape, dtype):
    compare(*make_case(shape, dtype))


def test_formula(backend):
    gate, up = make_case((300,))
    assert_rounds_to(swiglu(gate, up), gate.double() / (1 + gate.double().neg().exp()) * up.double())


def test_numbers_whose_exponential_is_none(backend):
    gate = torch.tensor([-1e30, -200.0, -104.0, -88.8, -20.0, -1e-20, 0.0, 1e-20, 20.0, 88.8, 200.0, 1e30])
    compare(gate, torch.linspace(-2, 3, len(gate)))
    compare(gate, torch.full_like(gate, 1e-30))


def test_strided_inputs(backend):
    """As gate and up are that come from one projection."""
    projected = torch.randn(6, 40)
    compare(projected[:, :20], projected[:, 20:])
    gates, ups = (strided_views(x) for x in torch.randn(2, 3, 4, 20))
    for name, other in zip(gates, reversed(ups), strict=True):
        compare(gates[name], ups[other])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_element_stays_alone(backend, poison):
    gate, up = make_case((5, 40))
    clean = run(swiglu, gate, up)
    gate[2, 3], up[4, 39] = poison, torch.nan
    others = torch.ones(5, 40, dtype=torch.bool)
    others[2, 3] = others[4, 39] = False
    assert all(torch.equal(a[others], b[others]) for a, b in zip(run(swiglu, gate, up), clean, strict=True))
    compare(gate, up)


def test_one_gradient_alone(backend):
    gate, up = make_case((5, 40))
    both = run(swiglu, gate, up)
    upstream = torch.randn(gate.shape, generator=seeded(3))
    for place, leaf in enumerate((gate, up)):
        leaf.requires_grad_()
        assert torch.equal(*torch.autograd.grad(swiglu(gate, up), leaf, upstream), both[1 + place])
        leaf.requires_grad_(False)


def isa_outputs() -> list[Tensor]:
    return [*run(swiglu, *make_case((40, 77)))]


def test_same_bits_on_every_instruction_set(cpu_backend):
    assert_same_bits_on_every_isa(__name__)


def test_bits_do_not_depend_on_threads(cpu_backend):
    case = make_case((90, 700))
    single, several = (with_threads(count, lambda: run(swiglu, *case)) for count in (1, 3))
    assert all(map(torch.equal, single, several))


def test_opcheck(fast_backend):
    gate, up = (x.requires_grad_() for x in make_case((3, 20)))
    torch.library.opcheck(torch.ops.fastppo.swiglu, (gate, up, fast_backend))


def test_compiles_without_graph_breaks(fast_backend):
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((3, 20), (5, 31)):
        case = make_case(shape)
        assert all(map(torch.equal, run(compiled, *case), run(swiglu, *case)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gate": torch.ones(2, 3).int()}, TypeError, "gate has dtype torch.int32"),
        ({"up": torch.ones(3)}, ValueError, r"up has shape \[3\], expected \[2, 3\] \(gate's shape\)"),
        ({"up": torch.ones(2, 3).half()}, TypeError, "up has dtype torch.float16, expected torch.float32 like gate"),
        ({"up": 1.0}, TypeError, "up is float, expected a torch.Tensor"),
        ({"up": torch.ones(2, 3).to("meta")}, ValueError, "up is on meta"),
    ],
)
def test_errors_name_the_argument(backend, change, error, message):
    with pytest.raises(error, match=message):
        swiglu(**{"gate": torch.ones(2, 3), "up": torch.ones(2, 3)} | change)
