"""`batch_invariant_linear` against its reference, and its promise: bits that do not depend on the batch."""

from __future__ import annotations

import pytest
import torch

from fastppo import batch_invariant_linear
from fastppo.reference.batch_invariant_linear import batch_invariant_linear as reference
from tests.cases import DTYPES, seeded, with_threads
from tests.isa import assert_same_bits_on_every_isa
from tests.tolerance import assert_as_exact_as_native


def make_case(rows: int, columns: int, inner: int, dtype: torch.dtype = torch.float32):
    generator = seeded(rows + columns + inner)
    shapes = (rows, inner), (columns, inner), (columns,)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def compare(x, weight, bias):
    native = torch.nn.functional.linear(x, weight, bias)
    exact = reference(x.double(), weight.double(), None if bias is None else bias.double())
    assert_as_exact_as_native(batch_invariant_linear(x, weight, bias), native, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size", [(1, 1, 1), (3, 5, 17), (4, 6, 16), (5, 7, 64), (9, 13, 100), (32, 130, 48), (7, 12, 15), (17, 70, 600)]
)
def test_sizes_and_dtypes(backend, size, dtype):
    """Tails of the blocks of rows, of columns and of K, which the last size cuts into parts."""
    x, weight, bias = make_case(*size, dtype=dtype)
    compare(x, weight, bias)
    compare(x, weight, None)


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (8,), (2, 3, 8)])
def test_leading_shapes(backend, shape):
    x, weight = torch.randn(shape), torch.randn(5, 8)
    out = batch_invariant_linear(x, weight)
    assert out.shape == (*shape[:-1], 5)
    assert_as_exact_as_native(out, reference(x, weight), reference(x.double(), weight.double()))


def test_nothing_to_sum_gives_the_bias(backend):
    bias = torch.tensor([1.0, 2.0])
    assert batch_invariant_linear(torch.empty(3, 0), torch.empty(2, 0), bias).tolist() == [[1.0, 2.0]] * 3


def test_strided_operands(backend):
    x, weight, bias = make_case(6, 9, 40)
    compare(x[::2], weight[::3], bias[::3])
    compare(x[:, 4:20], weight[:, 4:20], None)
    compare(x.t().contiguous().t(), weight.t().contiguous().t(), bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(37, 150, 200), (70, 20, 700)])
def test_bits_do_not_depend_on_the_other_rows(fast_backend, size, dtype):
    x, weight, bias = make_case(*size, dtype)
    whole = batch_invariant_linear(x, weight, bias)
    for rows in (slice(0, 1), slice(3, 10), slice(36, 37), slice(1, 37)):
        assert batch_invariant_linear(x[rows], weight, bias).equal(whole[rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_the_other_columns_or_threads(cpu_backend, dtype):
    x, weight, bias = make_case(37, 150, 200, dtype)
    whole = batch_invariant_linear(x, weight, bias)
    assert batch_invariant_linear(x, weight[11:14], bias[11:14]).equal(whole[:, 11:14])
    assert with_threads(3, lambda: batch_invariant_linear(x, weight, bias)).equal(whole)


def test_bits_do_not_depend_on_where_the_rows_lie(fast_backend):
    """Between other columns, and at no multiple of 16 bytes."""
    x, weight, bias = make_case(6, 70, 64, torch.bfloat16)
    wide = torch.full((6, 99), torch.nan, dtype=torch.bfloat16)
    wide[:, 3:67] = x
    assert batch_invariant_linear(wide[:, 3:67], weight, bias).equal(batch_invariant_linear(x, weight, bias))


def test_nan_stays_in_its_row_and_column(backend):
    x, weight, _ = make_case(6, 9, 20)
    x[2, 3], weight[4, 19] = torch.nan, torch.inf
    out = batch_invariant_linear(x, weight)
    bad = torch.zeros(6, 9, dtype=torch.bool)
    bad[2], bad[:, 4] = True, True
    assert out.isfinite().equal(~bad)


def isa_outputs():
    return [batch_invariant_linear(*make_case(7, 40, 100, dtype)).float() for dtype in DTYPES]


def test_same_bits_with_avx2_and_avx512(cpu_backend):
    """The plain kernel has no fused multiply-add to use."""
    assert_same_bits_on_every_isa(__name__, but="plain")


def test_opcheck(fast_backend):
    torch.library.opcheck(torch.ops.fastppo.batch_invariant_linear, (*make_case(3, 5, 17), fast_backend))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 3), torch.ones(4, 2)), ValueError, r"weight has shape \[4, 2\], expected \[N, 3\]"),
        ((torch.tensor(1.0), torch.ones(4, 2)), ValueError, r"x has shape \[\], expected"),
        (
            (torch.ones(2, 3), torch.ones(4, 3).half()),
            TypeError,
            "weight has dtype torch.float16, expected torch.float32",
        ),
        ((torch.ones(2, 3), torch.ones(4, 3), torch.ones(3)), ValueError, r"bias has shape \[3\], expected \[4\]"),
        ((torch.ones(2, 3).int(), torch.ones(4, 3)), TypeError, "x has dtype torch.int32"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        batch_invariant_linear(*arguments)
