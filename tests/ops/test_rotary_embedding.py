"""`rotary_embedding` against fp64 and against complex numbers: partial heads, views of a fused projection, positions out of range."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastppo.ops import rotary_embedding
from fastppo.reference.rotary_embedding import rotary_embedding as reference
from tests.cases import DTYPES, seeded, with_threads
from tests.isa import assert_same_bits_on_every_isa
from tests.tolerance import assert_as_exact_as_native, assert_rounds_to

PLACES = 50
# Tokens, heads, head size, R: one pair, tails of the lanes, heads of several blocks, elements that are not turned, no tokens, no heads.
SIZES = [(1, 1, 2, 2), (3, 2, 6, 6), (5, 3, 20, 8), (7, 17, 128, 128), (4, 2, 81, 66), (2, 1, 300, 34), (0, 2, 8, 8), (3, 0, 8, 8)]  # fmt: skip


def make_tables(width: int, places: int = PLACES) -> tuple[Tensor, Tensor]:
    """cos and sin [places, width] whose halves are equal, as models make them."""
    angles = torch.arange(places)[:, None] * 10000.0 ** -(torch.arange(0, width, 2) / width)
    return torch.cat([angles, angles], 1).cos(), torch.cat([angles, angles], 1).sin()


def make_case(tokens: int, heads: int, head_size: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = seeded(tokens + heads + head_size)
    x = torch.randn(tokens, heads, head_size, generator=generator).to(dtype)
    return [x, *make_tables(width), torch.randint(PLACES, (tokens,), generator=generator)]


def run(function, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The result and the gradient of x."""
    leaf = x.detach().requires_grad_()
    out = function(leaf, cos, sin, positions)
    return out.detach(), *torch.autograd.grad(out, leaf, torch.randn(x.shape, generator=seeded(3)).to(x.dtype))


def compare(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    ours, native = run(rotary_embedding, x, cos, sin, positions), run(reference, x, cos, sin, positions)
    exact = run(reference, x.double(), cos.double(), sin.double(), positions)
    for name, a, b, c in zip(("output", "gradient"), ours, native, exact, strict=True):
        assert a.dtype == x.dtype
        assert_as_exact_as_native(a, b, c, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(backend, size, dtype):
    compare(*make_case(*size, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tables_of_any_type_whose_halves_differ(backend, dtype):
    x, _, _, positions = make_case(5, 3, 20, 8)
    cos, sin = torch.randn(2, PLACES, 8).to(dtype)
    compare(x, cos, sin, positions)
    compare(x.half(), cos, sin, positions.int())


def test_turns_complex_numbers(backend):
    x, cos, sin, positions = make_case(6, 2, 10, 8)
    first, second = x.double()[..., :4], x.double()[..., 4:8]
    angle = torch.complex(cos.double(), sin.double())[positions][:, None, :4]
    turned = torch.complex(first, second) * angle
    expected = torch.cat([turned.real, turned.imag, x.double()[..., 8:]], -1)
    assert_rounds_to(rotary_embedding(x, cos, sin, positions), expected)


def test_scores_depend_on_the_distance_alone(backend):
    """What the embedding is for."""
    tables = make_tables(16)
    q, k = (x.expand(3, 1, 16) for x in torch.randn(2, 1, 1, 16))
    queries, keys = torch.tensor([3, 20, 49]), torch.tensor([1, 18, 47])
    scores = (rotary_embedding(q, *tables, queries) * rotary_embedding(k, *tables, keys)).sum((1, 2))
    wide = [reference(x[:1].double(), *make_tables(16), at[:1]) for x, at in ((q, queries), (k, keys))]
    assert_rounds_to(scores, (wide[0] * wide[1]).sum())


def test_views_of_a_fused_projection(backend):
    """Heads of q and k read where they lie, and any other strides."""
    _, cos, sin, positions = make_case(6, 2, 8, 8)
    projected = torch.randn(6, 5 * 8)
    for first, last in ((0, 3), (3, 4)):
        compare(projected[:, first * 8 : last * 8].unflatten(1, (-1, 8)), cos, sin, positions)
    x = torch.randn(6, 2, 8)
    compare(x.transpose(0, 1).contiguous().transpose(0, 1), cos, sin, positions)
    compare(
        x.transpose(1, 2).contiguous().transpose(1, 2),
        cos.t().contiguous().t(),
        sin,
        positions.repeat_interleave(2)[::2],
    )
    compare(x[:1].expand(6, 2, 8), cos, sin, positions)


def test_nan_stays_in_its_pair(backend):
    x, cos, sin, positions = make_case(6, 3, 10, 8)
    x[2, 1, 1], x[4, 0, 9] = torch.nan, torch.nan
    bad = rotary_embedding(x, cos, sin, positions).isnan().nonzero().tolist()
    assert bad == [[2, 1, 1], [2, 1, 5], [4, 0, 9]]


@pytest.mark.parametrize("position", [-1, PLACES, 1 << 40, -(1 << 40)])
def test_positions_out_of_range(backend, position):
    """ValueError, or NaN where the host does not wait for the device."""
    x, cos, sin, positions = make_case(6, 3, 10, 8)
    positions[4] = position
    if backend == "triton" or x.is_cuda:
        out = rotary_embedding(x, cos, sin, positions)
        assert out[4, :, :8].isnan().all() and out[4, :, 8:].isfinite().all()
        assert out[[0, 1, 2, 3, 5]].isfinite().all()
        return
    with pytest.raises(
        ValueError, match=rf"positions holds {position} at 4, expected numbers from 0 to 49 \(cos' rows"
    ):
        rotary_embedding(x, cos, sin, positions)


def test_second_derivatives(backend):
    """The op is linear in x: of its square they are the identity, as a rotation keeps lengths."""
    x, cos, sin, positions = make_case(3, 2, 8, 8)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(rotary_embedding(x, cos, sin, positions).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    assert_rounds_to(second, 2.0)


def isa_outputs() -> list[Tensor]:
    return [*run(rotary_embedding, *make_case(40, 3, 81, 66))]


def test_same_bits_on_every_instruction_set(cpu_backend):
    assert_same_bits_on_every_isa(__name__)


def test_bits_do_not_depend_on_threads(cpu_backend):
    case = make_case(300, 4, 128, 128)
    single, several = (with_threads(count, lambda: run(rotary_embedding, *case)) for count in (1, 3))
    assert all(map(torch.equal, single, several))


@pytest.mark.parametrize("backward", [False, True])
def test_opcheck(fast_backend, backward):
    x, *others = make_case(3, 2, 8, 6)
    torch.library.opcheck(torch.ops.fastppo.rotary_embedding, (x.requires_grad_(), *others, backward, fast_backend))


def test_compiles_without_graph_breaks(fast_backend):
    compiled = torch.compile(rotary_embedding, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((3, 2, 20, 8), (5, 4, 20, 8)):
        case = make_case(*size)
        assert all(map(torch.equal, run(compiled, *case), run(rotary_embedding, *case)))


X, TABLE = torch.ones(3, 2, 8), torch.ones(5, 6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X[0]}, ValueError, r"x has shape \[2, 8\], expected \[N, heads, D\]"),
        ({"x": X.long()}, TypeError, "x has dtype torch.int64"),
        ({"cos": TABLE[0]}, ValueError, r"cos has shape \[6\], expected \[P, R\]"),
        ({"cos": TABLE[:0]}, ValueError, r"cos has shape \[0, 6\], expected \[P, R\] with P >= 1"),
        ({"cos": torch.ones(5, 7)}, ValueError, r"cos has shape \[5, 7\], .* R even, from 2 to 8"),
        ({"cos": torch.ones(5, 10)}, ValueError, r"cos has shape \[5, 10\], .* R even, from 2 to 8"),
        ({"sin": TABLE[1:]}, ValueError, r"sin has shape \[4, 6\], expected \[5, 6\]"),
        ({"sin": TABLE.int()}, TypeError, "sin has dtype torch.int32"),
        ({"positions": torch.zeros(2, dtype=torch.long)}, ValueError, r"positions has shape \[2\], expected \[3\]"),
        ({"positions": torch.zeros(3)}, TypeError, "positions has dtype torch.float32"),
        ({"cos": TABLE.to("meta")}, ValueError, "cos is on meta"),
    ],
)
def test_errors_name_the_argument(backend, change, error, message):
    with pytest.raises(error, match=message):
        rotary_embedding(**{"x": X, "cos": TABLE, "sin": TABLE, "positions": torch.zeros(3, dtype=torch.long)} | change)
