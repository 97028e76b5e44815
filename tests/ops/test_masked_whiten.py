"""`masked_whiten` and `masked_mean` against fp64: large means, degenerate masks, dirty memory, several processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastppo.ops import masked_mean, masked_whiten
from fastppo.ops.masked_whiten import moments_inside, whitened
from fastppo.reference.masked_whiten import masked_mean as reference_mean
from fastppo.reference.masked_whiten import masked_whiten as reference
from tests.cases import DTYPES, with_threads
from tests.isa import assert_same_bits_on_every_isa
from tests.tolerance import assert_as_exact_as_native, assert_rounds_to

# One element, tails of sixteen lanes and of the 1024-element block, several blocks, nothing.
SHAPES = [(1,), (5,), (17,), (3, 7, 11), (1024,), (1025,), (33, 100), (0,), (4, 0)]


def compare(x: Tensor, mask: Tensor | None, **options) -> Tensor:
    ours = masked_whiten(x, mask, **options)
    assert ours.dtype == torch.float32 and ours.shape == x.shape
    assert_as_exact_as_native(ours, reference(x, mask, **options), reference(x.double(), mask, **options), "whitened")
    return ours


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whiten_values(backend, shape, dtype, masked, shift_mean):
    mask = torch.rand(shape) < 0.6 if masked else None
    compare((torch.randn(shape) * 3 + 2).to(dtype), mask, shift_mean=shift_mean)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mean_and_its_gradient(backend, shape, dtype, masked):
    mask = torch.rand(shape) < 0.6 if masked else None
    data = (torch.randn(shape) * 3 + 2).to(dtype)

    def run(function, x):
        x = x.clone().requires_grad_()
        mean = function(x, mask)
        (mean * 3).backward()
        return mean.detach(), x.grad

    ours, native, exact = run(masked_mean, data), run(reference_mean, data), run(reference_mean, data.double())
    assert ours[0].dtype == torch.float32 and ours[0].shape == () and ours[1].dtype == dtype
    for name, a, b, c in zip(("mean", "gradient"), ours, native, exact, strict=True):
        assert_as_exact_as_native(a, b, c, name)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_what_is_outside_the_mask_by_the_moments_inside(backend, shift_mean):
    """verl whitens every element, by the statistics of those inside the mask."""
    x, mask = torch.randn(33, 100) * 3 + 2, torch.rand(33, 100) < 0.6
    moments = moments_inside(x, mask)
    ours = whitened(x, None, moments, shift_mean)
    assert torch.equal(ours[mask], masked_whiten(x, mask, shift_mean=shift_mean)[mask])
    everywhere = [reference(x.to(dtype), shift_mean=shift_mean, moments=moments) for dtype in (x.dtype, torch.float64)]
    assert_as_exact_as_native(ours, *everywhere, "whitened")


def test_formula_as_trl_and_verl_write_it(backend):
    x, mask = torch.randn(6, 40) * 2 + 1, torch.rand(6, 40) < 0.5
    wide, n = x.double(), mask.sum()
    mean = (wide * mask).sum() / n
    variance = ((wide - mean).square() * mask).sum() / n * n / (n - 1)
    white = (wide - mean) * torch.rsqrt(variance + 1e-8)
    assert_rounds_to(masked_whiten(x, mask), white * mask)
    assert_rounds_to(masked_whiten(x, mask, shift_mean=False), (white + mean) * mask)
    assert_rounds_to(masked_mean(x, mask), mean)


@pytest.mark.parametrize("offset", [1e4, -1e6, 3e7])
def test_a_large_mean_does_not_cancel(backend, offset):
    x = torch.randn(3000) * 8 + offset
    white = compare(x, torch.rand(3000) < 0.8)
    assert 0.9 < white[white != 0].std() < 1.1


def test_one_outlier_first(backend):
    """The kernel's pivot is the first element: an outlier there must not swallow the others."""
    x = torch.randn(2500) * 1e-3
    x[0] = 1e6
    exact = (x.double() - x.double().mean()) * (x.double().var() + 1e-8).rsqrt()
    assert_rounds_to(masked_whiten(x), exact)


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3e8])
def test_zero_variance_gives_zero(backend, value):
    x, mask = torch.full((2000,), value), torch.rand(2000) < 0.5
    assert (masked_whiten(x, mask) == 0).all()
    assert_rounds_to(masked_whiten(x, mask, shift_mean=False), torch.where(mask, x, 0))
    assert_rounds_to(masked_mean(x, mask), x[0])


def test_one_element_and_none(backend):
    x, mask = torch.randn(5, 300), torch.zeros(5, 300, dtype=torch.bool)
    assert (masked_whiten(x, mask) == 0).all() and masked_mean(x, mask) == 0
    leaf = x.clone().requires_grad_()
    masked_mean(leaf, mask).backward()
    assert (leaf.grad == 0).all()
    mask[3, 250] = True
    assert (masked_whiten(x, mask) == 0).all() and masked_mean(x, mask) == x[3, 250]
    assert torch.equal(masked_whiten(x, mask, shift_mean=False), torch.where(mask, x, 0))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_nothing_under_the_mask_is_read(backend, poison):
    x, mask = torch.randn(7, 300), torch.rand(7, 300) < 0.5
    mask[0, 0] = False
    clean, dirty = x.masked_fill(~mask, 0), x.masked_fill(~mask, poison)
    assert torch.equal(masked_whiten(dirty, mask), masked_whiten(clean, mask))
    leaf = dirty.requires_grad_()
    mean = masked_mean(leaf, mask)
    mean.backward()
    assert torch.equal(mean, masked_mean(clean, mask)) and (leaf.grad[~mask] == 0).all() and leaf.grad.isfinite().all()


# Where an infinity is a block's first, its last, in the second block, and where nothing else is.
INFINITE = {
    "first": [0],
    "last of a block": [1023],
    "second block": [1024, 1700],
    "both blocks": [0, 1500],
    "all": list(range(2500)),
}


@pytest.mark.parametrize("signs", [(1,), (-1,), (1, -1)], ids=str)
@pytest.mark.parametrize("places", INFINITE.values(), ids=INFINITE)
def test_infinities(backend, places, signs):
    """As in a sum: one infinity is the mean, two of either sign are NaN."""
    x = torch.randn(2500)
    x[places] = torch.inf
    x[places[-1]] *= signs[-1]
    if len(signs) == 1:
        x = torch.where(x.isinf(), x.abs() * signs[0], x)
    exact = reference_mean(x.double())
    assert_as_exact_as_native(masked_mean(x), reference_mean(x), exact, "mean")
    compare(x, None)


@pytest.mark.parametrize("place", [0, 700, 1900])
def test_nan_inside_the_mask_shows(backend, place):
    x, mask = torch.randn(2000), torch.arange(2000) % 2 == 0
    x[place] = torch.nan
    white = masked_whiten(x, mask)
    assert torch.equal(white.isnan(), mask) and masked_mean(x, mask).isnan()


def test_strides(backend):
    x, mask = torch.randn(30, 40), torch.rand(30, 40) < 0.5
    expected, mean = masked_whiten(x, mask), masked_mean(x, mask)
    wide = torch.full((30, 80), torch.nan)
    wide[:, ::2] = x
    assert torch.equal(masked_whiten(wide[:, ::2], mask), expected) and masked_mean(wide[:, ::2], mask) == mean
    assert torch.equal(masked_whiten(x.T.contiguous().T, mask.T.contiguous().T), expected)
    row = mask[:1].expand(30, 40)
    assert torch.equal(masked_whiten(x, row), masked_whiten(x, row.contiguous()))


def test_float64_and_detachment(backend):
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    white = masked_whiten(x)
    assert white.dtype == torch.float64 and not white.requires_grad
    assert_rounds_to(white.detach(), (x - x.mean()).detach() * torch.rsqrt(x.var() + 1e-8).detach())
    assert masked_mean(x).dtype == torch.float64
    assert not masked_whiten(torch.randn(5, requires_grad=True)).requires_grad
    assert torch.autograd.gradcheck(lambda y: masked_mean(y, torch.arange(50) < 20), x)


def test_bits_do_not_depend_on_threads(cpu_backend):
    x, mask = torch.randn(100_001), torch.rand(100_001) < 0.5
    single, several = (with_threads(n, lambda: (masked_whiten(x, mask), masked_mean(x, mask))) for n in (1, 3))
    assert torch.equal(single[0], several[0]) and torch.equal(single[1], several[1])


def isa_outputs() -> list[Tensor]:
    torch.manual_seed(0)
    x, mask = torch.randn(5003) * 3 + 100, torch.rand(5003) < 0.5
    return [masked_mean(x), masked_mean(x, mask), masked_whiten(x), masked_whiten(x, mask, shift_mean=False)]


def test_same_bits_on_every_instruction_set(cpu_backend):
    assert_same_bits_on_every_isa(__name__)


BOUNDS = {"uneven": [0, 1300, 3000], "one-empty": [0, 0, 3000]}


def _whiten_parts(rank: int, x: Tensor, mask: Tensor, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for name, bounds in BOUNDS.items():
        part = slice(bounds[rank], bounds[rank + 1])
        with torch.no_grad():
            out = [masked_whiten(x[part], mask[part], shift_mean=s, group=dist.group.WORLD) for s in (True, False)]
        torch.save(out, f"{folder}/{name}-{rank}.pt")
    dist.destroy_process_group()


def test_a_group_whitens_together(tmp_path):
    """Two processes, each with its part of a batch whose halves differ in mean: the result is that of one process."""
    x, mask = torch.randn(3000, device="cpu") + 1000, torch.rand(3000, device="cpu") < 0.7
    x[1300:] += 5
    arguments = (x, mask, str(tmp_path))
    torch.multiprocessing.start_processes(_whiten_parts, arguments, nprocs=2, start_method="forkserver")
    for name in BOUNDS:
        parts = [torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]
        for i, shift_mean in enumerate((True, False)):
            ours = torch.cat([part[i] for part in parts])
            native, exact = (reference(y, mask, shift_mean=shift_mean) for y in (x, x.double()))
            assert_as_exact_as_native(ours, native, exact, name)


def test_opcheck(fast_backend):
    x, mask = torch.randn(4, 33, requires_grad=True), torch.rand(4, 33) < 0.5
    for m in (None, mask):
        torch.library.opcheck(torch.ops.fastppo.masked_moments, (x, m))
        moments = torch.ops.fastppo.masked_moments(x.detach(), m)
        torch.library.opcheck(torch.ops.fastppo.masked_whiten, (x.detach(), m, *moments, True))


def test_compiles_without_graph_breaks(fast_backend):
    def function(x, mask):
        return masked_whiten(x, mask), masked_mean(x, mask)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((4, 33), (5, 20)):
        x, mask = torch.randn(shape, requires_grad=True), torch.rand(shape) < 0.5
        (white, mean), expected = compiled(x, mask), function(x, mask)
        assert torch.equal(white, expected[0]) and torch.equal(mean, expected[1])
        (ours,) = torch.autograd.grad(mean, x)
        assert torch.equal(ours, torch.autograd.grad(expected[1], x)[0])


@pytest.mark.parametrize("function", [masked_whiten, masked_mean])
@pytest.mark.parametrize(
    ("x", "mask", "error", "message"),
    [
        (torch.zeros(3, dtype=torch.long), None, TypeError, "x has dtype torch.int64"),
        ([1.0], None, TypeError, "x is list"),
        (torch.zeros(3), torch.ones(3), TypeError, "mask has dtype torch.float32, expected bool"),
        (torch.zeros(3), torch.ones(4, dtype=torch.bool), ValueError, r"mask has shape \[4\], expected \[3\]"),
        (torch.zeros(3), torch.ones(3, dtype=torch.bool, device="meta"), ValueError, "mask is on meta"),
    ],
)
def test_errors_name_the_argument(backend, function, x, mask, error, message):
    with pytest.raises(error, match=message):
        function(x, mask)
