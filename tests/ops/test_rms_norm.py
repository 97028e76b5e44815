"""`rms_norm` against fp64: values and gradients with and without a residual, odd shapes, dirty memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastppo.ops import rms_norm
from fastppo.ops.rms_norm import MAX_TRITON_WIDTH
from fastppo.reference.rms_norm import rms_norm as reference
from tests.cases import DTYPES, seeded, strided_views, with_threads
from tests.isa import assert_same_bits_on_every_isa
from tests.tolerance import assert_as_exact_as_native, assert_rounds_to

EPS = 1e-5
# One pair, tails of the lanes, several parts of the rows whose weight gradients are summed apart, nothing, other leading shapes.
SHAPES = [(1, 2), (3, 17), (5, 252), (2, 1023), (130, 33), (300, 5), (0, 33), (2, 0, 8), (8,), (2, 3, 8)]


def make_case(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, with_residual: bool = True) -> dict:
    generator = seeded(sum(shape))
    x, residual = torch.randn((2, *shape), generator=generator).to(dtype)
    case = {"x": x, "weight": (1 + torch.randn(shape[-1], generator=generator) / 4).to(dtype)}
    return case | ({"residual": residual} if with_residual else {})


def outputs_of(function, case: dict, eps: float = EPS) -> dict[str, Tensor]:
    """Both results and the gradients of all tensors, with an upstream gradient for each result."""
    leaves = {name: x.detach().requires_grad_() for name, x in case.items()}
    found = function(**leaves, eps=eps)
    outputs = found if isinstance(found, tuple) else (found,)
    upstream = [torch.randn(x.shape, generator=seeded(place)).to(x.dtype) for place, x in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    named = dict(zip(("normed", "total"), (x.detach() for x in outputs), strict=False))
    return named | {f"d_{name}": d for name, d in zip(leaves, gradients, strict=True)}


def in_fp64(case: dict) -> dict:
    return {name: x.double() for name, x in case.items()}


def compare(case: dict, eps: float = EPS) -> None:
    ours, native = outputs_of(rms_norm, case, eps), outputs_of(reference, case, eps)
    for name, exact in outputs_of(reference, in_fp64(case), eps).items():
        assert ours[name].dtype == case["x"].dtype, name
        assert_as_exact_as_native(ours[name], native[name], exact, name)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend, shape, dtype, with_residual):
    compare(make_case(shape, dtype, with_residual))


def test_rows_of_one_element(backend):
    """Their gradient is all that cancels."""
    case = make_case((5, 1), with_residual=False)
    assert_rounds_to(rms_norm(**case, eps=EPS), reference(**in_fp64(case), eps=EPS))


def test_formula(backend):
    case = make_case((6, 40))
    total = case["x"].double() + case["residual"].double()
    expected = total / (total.square().mean(-1, keepdim=True) + EPS).sqrt() * case["weight"].double()
    normed, found = rms_norm(**case, eps=EPS)
    assert_rounds_to(normed, expected)
    assert_rounds_to(found, total)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_that_of_the_total_as_returned(backend, dtype):
    case = make_case((9, 50), dtype)
    normed, total = rms_norm(**case, eps=EPS)
    assert_rounds_to(total, case["x"].double() + case["residual"].double())
    assert torch.equal(normed, rms_norm(total, case["weight"], eps=EPS))


@pytest.mark.parametrize("scale", [2.0**-33, 2.0**33])
def test_the_norm_does_not_know_the_scale(backend, scale):
    """Without an epsilon; the gradient is the scale's inverse."""
    case = make_case((4, 33), with_residual=False)
    ours, exact = outputs_of(rms_norm, case | {"x": case["x"] * scale}, 0.0), outputs_of(reference, in_fp64(case), 0.0)
    assert_rounds_to(ours["normed"], exact["normed"])
    assert_rounds_to(ours["d_x"] * scale, exact["d_x"])
    assert_rounds_to(ours["d_weight"], exact["d_weight"])


def test_strided_inputs(backend):
    x, other = torch.randn(2, 3, 4, 20)
    for name, view in strided_views(x).items():
        residual = strided_views(other)[name]
        weight = torch.randn(20, 2)[:, 0]
        compare({"x": view, "weight": weight, "residual": residual})


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_bad_row_stays_alone(backend, poison):
    case = make_case((70, 20))
    clean = outputs_of(rms_norm, case)
    case["x"][5, 3] = poison
    found = outputs_of(rms_norm, case)
    others = torch.arange(70) != 5
    for name in ("normed", "total", "d_x", "d_residual"):
        assert torch.equal(found[name][others], clean[name][others]), name
    assert found["normed"][5].isnan().any()


@pytest.mark.parametrize(("result", "name"), [(0, "x"), (0, "weight"), (0, "residual"), (1, "x"), (1, "residual")])
def test_one_result_and_one_gradient_alone(backend, result, name):
    case = make_case((5, 12))
    gradients = []
    for function, inputs in ((rms_norm, case), (reference, in_fp64(case))):
        leaf = inputs[name].detach().requires_grad_()
        output = function(**inputs | {name: leaf}, eps=EPS)[result]
        gradients += torch.autograd.grad(output.square().sum(), leaf)
    assert_rounds_to(*gradients)


def test_wide_rows(fast_backend):
    """More than a Triton program holds goes to the reference."""
    compare(make_case((2, MAX_TRITON_WIDTH + 1)))


def isa_outputs() -> list[Tensor]:
    return [*outputs_of(rms_norm, make_case((70, 77))).values()]


def test_same_bits_on_every_instruction_set(cpu_backend):
    assert_same_bits_on_every_isa(__name__)


def test_bits_depend_on_neither_threads_nor_other_rows(cpu_backend):
    case = make_case((300, 700))
    single, several = (with_threads(count, lambda: outputs_of(rms_norm, case)) for count in (1, 3))
    assert all(torch.equal(single[name], several[name]) for name in single)
    alone = rms_norm(case["x"][7:9], case["weight"], eps=EPS, residual=case["residual"][7:9])
    assert torch.equal(alone.normed, single["normed"][7:9])


@pytest.mark.parametrize("with_residual", [False, True])
def test_opcheck(fast_backend, with_residual):
    case = {name: x.requires_grad_() for name, x in make_case((3, 20)).items()}
    residual = case["residual"] if with_residual else None
    torch.library.opcheck(torch.ops.fastppo.rms_norm, (case["x"], residual, case["weight"], EPS, fast_backend))


def test_compiles_without_graph_breaks(fast_backend):
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((3, 20), (5, 31)):
        case = make_case(shape)
        found, expected = outputs_of(compiled, case), outputs_of(rms_norm, case)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, r"x has shape \[\], expected \[..., H\]"),
        ({"x": torch.ones(2, 0)}, ValueError, r"x has shape \[2, 0\], expected \[..., H\] with H >= 1"),
        ({"x": torch.ones(2, 3).int()}, TypeError, "x has dtype torch.int32"),
        ({"weight": torch.ones(4)}, ValueError, r"weight has shape \[4\], expected \[3\]"),
        ({"weight": torch.ones(3).half()}, TypeError, "weight has dtype torch.float16, expected torch.float32 like x"),
        ({"weight": None}, TypeError, "weight is NoneType"),
        ({"residual": torch.ones(3)}, ValueError, r"residual has shape \[3\], expected \[2, 3\]"),
        ({"residual": torch.ones(2, 3).to("meta")}, ValueError, "residual is on meta"),
        ({"eps": -1.0}, ValueError, "eps is -1.0"),
        ({"eps": None}, TypeError, "eps is None"),
    ],
)
def test_errors_name_the_argument(backend, change, error, message):
    with pytest.raises(error, match=message):
        rms_norm(**{"x": torch.ones(2, 3), "weight": torch.ones(3), "eps": EPS} | change)
