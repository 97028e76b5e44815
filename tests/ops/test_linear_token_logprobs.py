"""`linear_token_logprobs` against its fp64 reference: values, gradients, chunk boundaries, frozen and mixed operands."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import _head, batch_invariant_linear, linear_token_logprobs, token_logprobs
from fastppo.reference.linear_token_logprobs import linear_token_logprobs as reference
from tests.cases import DTYPES
from tests.isa import assert_same_bits_on_every_isa
from tests.tolerance import assert_as_exact_as_native, assert_no_worse_than

OPTIONS = [{}, {"temperature": 0.7}, {"softcap": 5.0, "logit_scale": 0.25, "temperature": 1.3}]


def operands(rows=13, hidden=24, vocab=70, dtype=torch.float32, bias=True):
    made = torch.randn(rows, hidden), torch.randn(vocab, hidden), torch.randn(vocab) if bias else None
    return [None if x is None else x.to(dtype) for x in made] + [torch.randint(0, vocab, (rows,))]


def run(function, hidden, weight, bias, labels, **options):
    leaves = [x if x is None else x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
    logprobs, entropy = function(leaves[0], leaves[1], labels, leaves[2], return_entropy=True, **options)
    up = torch.linspace(-1, 2, logprobs.numel(), dtype=logprobs.dtype).view(logprobs.shape)
    ((logprobs * up).sum() + (entropy * up.flip(0)).sum()).backward()
    return logprobs.detach(), entropy.detach(), *(x.grad for x in leaves if x is not None)


def compare(hidden, weight, bias, labels, **options):
    ours = run(linear_token_logprobs, hidden, weight, bias, labels, **options)
    native = run(reference, hidden, weight, bias, labels, **options)
    wide = [x if x is None else x.double() for x in (hidden, weight, bias)]
    exact = run(reference, *wide, labels, **options)
    names = ["logprobs", "entropy", "d_hidden", "d_weight", "d_bias"]
    for name, a, b, c in zip(names, ours, native, exact, strict=False):
        assert_as_exact_as_native(a, b, c, name)


def set_tiles(monkeypatch, rows: int, columns: int, **others: int) -> None:
    for backend, sizes in _head.SIZES.items():
        smaller = sizes._replace(tile_rows=rows, tile_columns=columns, **others)
        monkeypatch.setitem(_head.SIZES, backend, smaller)


@pytest.fixture
def small_tiles(monkeypatch):
    """Four rows by thirty columns: several tiles each way, the last ones smaller."""
    set_tiles(monkeypatch, 4, 30)


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "temperature", "softcap"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients(backend, small_tiles, dtype, bias, options):
    compare(*operands(dtype=dtype, bias=bias), **options)


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 8])
def test_tile_boundaries(backend, small_tiles, rows):
    compare(*operands(rows=rows))


def test_tiles_do_not_change_the_result(cpu_backend, monkeypatch):
    hidden, weight, bias, labels = operands(rows=9)
    whole = linear_token_logprobs(hidden, weight, labels, bias)
    set_tiles(monkeypatch, 1, 1)
    exact = reference(hidden.double(), weight.double(), labels, bias.double())
    assert_as_exact_as_native(linear_token_logprobs(hidden, weight, labels, bias), whole, exact)


@pytest.mark.parametrize("ignored", [False, True])
def test_kept_logits_serve_every_backward_pass(cpu_backend, monkeypatch, ignored):
    """Four tiles of 49 are kept, or none; a second backward pass finds them as the first one did."""
    hidden, weight, bias, labels = operands()
    if ignored:
        labels[[0, 3, 4]] = -100
    results = []
    for most in (0, 4):
        set_tiles(monkeypatch, 2, 10, most_kept_tiles=most)
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        loss = linear_token_logprobs(leaves[0], leaves[1], labels, leaves[2]).square().sum()
        results += [torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_logits_that_fit_into_one_tile_are_made_once(cpu_backend, monkeypatch):
    """Two tiles of 35 columns, of fewer rows than a tile may have: the backward pass finds both."""
    made = []
    multiply = _head.Head.multiply
    monkeypatch.setattr(_head.Head, "multiply", lambda head, *args: (made.append(args[1]), multiply(head, *args)))
    hidden, weight, bias, labels = operands()
    results = []
    for most, products in ((0, 4), (3, 2)):
        made.clear()
        set_tiles(monkeypatch, 100, 35, most_kept_tiles=most)
        results.append(run(linear_token_logprobs, hidden, weight, bias, labels))
        assert len(made) == products
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("banned", [slice(0, 30), slice(30, 60), slice(60, 70), slice(0, 69)], ids=str)
def test_tiles_of_minus_infinity(backend, small_tiles, banned):
    """A whole tile of banned tokens, the first one too, adds nothing and breaks nothing."""
    hidden, weight, bias, labels = operands(rows=6)
    bias[banned], labels[:] = -torch.inf, 69
    labels[0], bias[69] = 10, 0.5  # the first label may be banned itself
    ours = linear_token_logprobs(hidden, weight, labels, bias, return_entropy=True)
    exact = reference(hidden.double(), weight.double(), labels, bias.double(), return_entropy=True)
    for a, b in zip(ours, exact, strict=True):
        assert_as_exact_as_native(a, b, b)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 35, 69])
def test_rows_without_a_distribution_give_nan_alone(backend, small_tiles, value, column):
    hidden, weight, bias, labels = operands()
    hidden[:, 0] = 0
    hidden[7, 0], weight[:, 0] = 1.0, 0
    weight[column, 0] = 3e38 if value == torch.inf else 0
    hidden[7, 0] = 3e38 if value == torch.inf else value
    for out in linear_token_logprobs(hidden, weight, labels, bias, return_entropy=True):
        assert out.isnan().tolist() == [row == 7 for row in range(13)]


def test_no_memory_is_left_unwritten(cpu_backend, small_tiles):
    """Deterministic mode fills new tensors with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        for dtype in DTYPES:
            hidden, weight, bias, labels = operands(dtype=dtype)
            labels[2:5] = -100
            assert all(x.isfinite().all() for x in run(linear_token_logprobs, hidden, weight, bias, labels))
    finally:
        torch.use_deterministic_algorithms(False)


def test_labels_out_of_range_give_nan_where_the_host_does_not_look(fast_backend):
    if fast_backend == "cpu":
        pytest.skip("raises: test_errors_name_the_argument")
    hidden, weight, bias, labels = operands()
    labels[[2, 5]] = torch.tensor([70, -1])
    logprobs = linear_token_logprobs(hidden, weight, labels, bias)
    assert logprobs.isnan().tolist() == [row in (2, 5) for row in range(13)]


def test_small_gradients_of_logits_keep_their_digits(fast_backend):
    """Of 2,000 tokens as likely as each other none has a gradient that fp16 holds with 3 digits; their sum with hidden has one."""
    hidden, weight = torch.zeros(3, 4).half(), 1 + torch.randn(2000, 4).half() / 8
    weight[0], labels = 0, torch.zeros(3, dtype=torch.int64)

    def d_hidden(function, dtype):
        states = hidden.to(dtype).requires_grad_()
        loss = 1e-4 * function(states, weight.to(dtype), labels).sum()
        return torch.autograd.grad(loss, states)[0]

    ours, native = (d_hidden(function, torch.float16) for function in (linear_token_logprobs, reference))
    assert_as_exact_as_native(ours, native, d_hidden(reference, torch.float64))


def test_ignored_rows_reach_nothing(backend, small_tiles):
    hidden, weight, bias, labels = operands()
    labels[::3], hidden[::3] = -100, torch.nan
    logprobs, entropy, d_hidden, d_weight, d_bias = run(linear_token_logprobs, hidden, weight, bias, labels)
    assert (logprobs[::3] == 0).all() and (entropy[::3] == 0).all() and (d_hidden[::3] == 0).all()
    kept = labels != -100
    clean = run(linear_token_logprobs, hidden[kept], weight, bias, labels[kept])
    exact = run(reference, *(x.double() for x in (hidden[kept], weight, bias)), labels[kept])
    assert_as_exact_as_native(logprobs[kept], clean[0], exact[0])
    assert d_weight.isfinite().all() and d_bias.isfinite().all()


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_operands_get_no_gradient(backend, frozen):
    *leaves, labels = operands()
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i != frozen)
    linear_token_logprobs(leaves[0], leaves[1], labels, leaves[2]).sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [i == frozen for i in range(3)]


def test_tied_weight(backend):
    """The weight is the embedding too: both gradients add up."""
    embedding = torch.randn(70, 24)
    tokens, labels = torch.randint(0, 70, (6,)), torch.randint(0, 70, (6,))

    def gradient(function, dtype: torch.dtype) -> torch.Tensor:
        weight = embedding.to(dtype, copy=True).requires_grad_()
        function(weight[tokens], weight, labels).sum().backward()
        return weight.grad

    ours, native = (gradient(function, torch.float32) for function in (linear_token_logprobs, reference))
    assert_as_exact_as_native(ours, native, gradient(reference, torch.float64))


def test_mixed_types_as_autocast_makes_them(backend):
    hidden, weight, bias, labels = operands()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = linear_token_logprobs(hidden.bfloat16(), weight, labels, bias)
    native = reference(hidden.bfloat16().float(), weight, labels, bias)
    exact = reference(hidden.bfloat16().double(), weight.double(), labels, bias.double())
    assert ours.dtype == torch.float32
    assert_as_exact_as_native(ours, native, exact, "logprobs, not rounded to bf16 on the way")


def test_leading_shapes(backend):
    hidden, weight, bias, labels = operands(rows=12)
    flat = linear_token_logprobs(hidden, weight, labels, bias)
    shaped = linear_token_logprobs(hidden.view(3, 4, 24), weight, labels.view(3, 4).int(), bias)
    assert torch.equal(shaped, flat.view(3, 4))
    transposed = hidden.view(3, 4, 24).transpose(0, 1)
    exact = reference(hidden.double(), weight.double(), labels, bias.double()).view(3, 4).T
    ours = linear_token_logprobs(transposed, weight, labels.view(3, 4).T, bias)
    assert_as_exact_as_native(ours, flat.view(3, 4).T, exact)


def isa_outputs() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [x for dtype in DTYPES for x in run(linear_token_logprobs, *operands(dtype=dtype, vocab=1100))]


def test_bits_do_not_depend_on_instruction_set(cpu_backend):
    assert_same_bits_on_every_isa(__name__)


@pytest.mark.parametrize("bias", [False, True])
def test_batch_invariant_logits(cpu_backend, bias):
    """Tiles of columns and rows; each row has the bits that the sampler's products give it, alone and among others."""
    hidden, weight, bias, labels = operands(rows=40, hidden=300, vocab=2500, bias=bias)
    found = linear_token_logprobs(hidden, weight, labels, bias, batch_invariant=True)
    assert torch.equal(found, token_logprobs(batch_invariant_linear(hidden, weight, bias), labels))
    part = linear_token_logprobs(hidden[7:12], weight, labels[7:12], bias, batch_invariant=True)
    assert torch.equal(part, found[7:12])
    leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    exact = torch.autograd.grad(reference(*leaves, labels, None if bias is None else bias.double()).sum(), leaves)
    ours = [x.requires_grad_() for x in (hidden, weight)]
    gradients = torch.autograd.grad(linear_token_logprobs(*ours, labels, bias, batch_invariant=True).sum(), ours)
    native = torch.autograd.grad(reference(*ours, labels, bias).sum(), ours)
    for name, values in zip(("hidden", "weight"), zip(gradients, native, exact, strict=True), strict=True):
        assert_no_worse_than(*values, name)


def test_batch_invariant_logits_are_refused_elsewhere():
    hidden, weight, bias, labels = operands(dtype=torch.float64)
    with pytest.raises(ValueError, match="batch_invariant is True, expected False for torch.float64 on cpu"):
        linear_token_logprobs(hidden, weight, labels, bias, batch_invariant=True)


def test_float64_is_exact():
    hidden, weight, bias, labels = operands(rows=3, hidden=4, vocab=7, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(lambda h, w, b: linear_token_logprobs(h, w, labels, b), leaves)


def test_opcheck(cpu_backend):
    hidden, weight, bias, labels = operands()
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    for b in (None, bias.requires_grad_()):
        arguments = (*leaves, labels, b, 0.9, 0.0, 1.0, -100, True, True, True, "cpu")
        torch.library.opcheck(torch.ops.fastppo.linear_token_logprobs, arguments)


def test_compiles_without_graph_breaks(cpu_backend):
    hidden, weight, bias, labels = operands()
    compiled = torch.compile(linear_token_logprobs, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, weight, labels, bias), linear_token_logprobs(hidden, weight, labels, bias))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
        ({"labels": torch.tensor([0, 70])}, ValueError, "labels holds 70 at flat position 1"),
        ({"labels": torch.tensor([0])}, ValueError, r"labels has shape \[1\]"),
        ({"weight": torch.zeros(70, 23)}, ValueError, r"hidden has shape \[2, 24\], expected \[..., 23\]"),
        ({"bias": torch.zeros(69)}, ValueError, r"bias has shape \[69\]"),
        ({"weight": torch.zeros(70)}, ValueError, r"weight has shape \[70\]"),
        ({"hidden": torch.zeros(2, 24, dtype=torch.int32)}, TypeError, "hidden has dtype torch.int32"),
    ],
)
def test_errors_name_the_argument(cpu_backend, change, error, message):
    arguments = {
        "hidden": torch.zeros(2, 24),
        "weight": torch.zeros(70, 24),
        "labels": torch.tensor([1, 2]),
        "bias": None,
    }
    with pytest.raises(error, match=message):
        linear_token_logprobs(**arguments | change)
