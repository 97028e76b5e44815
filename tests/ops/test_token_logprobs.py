"""`token_logprobs` against its fp64 reference: values, gradients, adversarial logits, strides, registration."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import token_logprobs
from fastppo.reference.token_logprobs import token_logprobs as reference
from tests.cases import DTYPES, ROWS_BY_VOCAB, strided_views
from tests.tolerance import assert_as_exact_as_native

OPTIONS = [
    {},
    {"temperature": 0.7},
    {"softcap": 5.0, "logit_scale": 0.25, "temperature": 1.3},
]


def run(function, logits, labels, **options):
    """(logprobs, entropy, gradient) for a fixed, uneven upstream gradient."""
    logits = logits.detach().clone().requires_grad_()
    logprobs, entropy = function(logits, labels, return_entropy=True, **options)
    up = torch.linspace(-1, 2, logprobs.numel(), dtype=logprobs.dtype).view(logprobs.shape)
    ((logprobs * up).sum() + (entropy * up.flip(0)).sum()).backward()
    return logprobs.detach(), entropy.detach(), logits.grad


def compare(logits, labels, **options):
    ours = run(token_logprobs, logits, labels, **options)
    native = run(reference, logits, labels, **options)
    exact = run(reference, logits.double(), labels, **options)
    for name, a, b, c in zip(("logprobs", "entropy", "gradient"), ours, native, exact, strict=True):
        assert_as_exact_as_native(a, b, c, name)
    assert ours[0].dtype == ours[1].dtype == torch.float32 and ours[2].dtype == logits.dtype


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "temperature", "softcap"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS_BY_VOCAB, ids=str)
def test_values_and_gradients(backend, shape, dtype, options):
    logits = (torch.randn(shape) * 4).to(dtype)
    compare(logits, torch.randint(0, shape[1], shape[:1]), **options)


@pytest.mark.parametrize("offset", [-1e4, -80.0, 80.0, 1e4])
def test_shifted_logits(backend, offset):
    """All negative or huge logits: only differences matter."""
    compare(torch.randn(3, 300) + offset, torch.randint(0, 300, (3,)))


@pytest.mark.parametrize("softcap", [None, 1e-10, 30.0, 1e10])
@pytest.mark.parametrize("temperature", [1e-10, 1e-3, 1e10])
@pytest.mark.parametrize("logit_scale", [-1e10, 1e-10, 1.0, 1e10])
def test_every_admissible_number(backend, logit_scale, temperature, softcap):
    """What used to give NaN beyond fp32's range is refused; up to the bounds no logit of a model leaves it."""
    logits, labels = torch.randn(4, 60) * torch.tensor([[1e-3], [1.0], [1e3], [1e5]]), torch.randint(0, 60, (4,))
    options = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    ours, native = (run(function, logits, labels, **options) for function in (token_logprobs, reference))
    exact = run(reference, logits.double(), labels, **options)
    for name, a, b, c in zip(("logprobs", "entropy"), ours, native, exact, strict=False):
        assert_as_exact_as_native(a, b, c, name)
    assert ours[2].isfinite().all()
    if softcap is None:  # near a cap the slope 1 - tanh^2 is a difference that leaves fp32 few digits
        assert_as_exact_as_native(ours[2], native[2], exact[2], "gradient")


@pytest.mark.parametrize("place", [slice(0, 1024), slice(1024, 2048), slice(2000, 2100), slice(0, 2099)], ids=str)
def test_blocks_of_minus_infinity(backend, place):
    """A whole block of -inf (banned tokens), at the start too, adds nothing and breaks nothing."""
    logits = torch.randn(4, 2100)
    logits[:, place] = -torch.inf
    labels = torch.tensor([2099, 2099, 0, 2050])  # banned labels have log-probability -inf
    exact = reference(logits.double(), labels, return_entropy=True)
    ours = token_logprobs(logits, labels, return_entropy=True)
    for a, b in zip(ours, exact, strict=True):
        assert_as_exact_as_native(a, b, b)


def test_gradient_beside_minus_infinity(backend):
    """0 * inf never enters the gradient of a row that holds banned tokens."""
    logits = torch.randn(2, 40)
    logits[:, 5:20] = -torch.inf
    compare(logits, torch.tensor([0, 30]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 1500, 2099])
def test_poisoned_rows_give_nan_alone(backend, value, column):
    logits = torch.randn(3, 2100)
    logits[1, column] = value
    labels = torch.tensor([7, 8, 9])
    logprobs, entropy = token_logprobs(logits, labels, return_entropy=True)
    for out in (logprobs, entropy):
        assert out.isnan().tolist() == [False, True, False]


def test_row_of_minus_infinity_is_nan(backend):
    assert token_logprobs(torch.full((1, 50), -torch.inf), torch.tensor([3])).isnan().all()


def test_nan_hidden_in_a_row_of_minus_infinity(backend):
    logits = torch.full((1, 1100), -torch.inf)
    logits[0, 3], logits[0, 1050] = torch.nan, 1.0
    assert token_logprobs(logits, torch.tensor([1050])).isnan().all()


def test_ignored_rows_reach_nothing(backend):
    """NaN logits under ignore_index: outputs 0, gradient 0, neighbours untouched."""
    logits = torch.randn(4, 100)
    logits[1], logits[3] = torch.nan, torch.inf
    labels = torch.tensor([5, -100, 6, -100])
    logprobs, entropy, grad = run(token_logprobs, logits, labels)
    assert logprobs[1] == logprobs[3] == entropy[1] == entropy[3] == 0
    assert (grad[1] == 0).all() and (grad[3] == 0).all() and grad.isfinite().all()
    clean = run(token_logprobs, logits[[0, 2]], labels[[0, 2]])[0]
    assert torch.equal(logprobs[[0, 2]], clean)


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "time-major", "vocabulary-major", "expanded"])
def test_strides(backend, layout):
    logits = torch.randn(3, 4, 70)
    view = strided_views(logits)[layout]
    labels = torch.randint(0, 70, (4, 3)).T
    expected = token_logprobs(view.contiguous(), labels.contiguous(), return_entropy=True)
    ours = token_logprobs(view, labels, return_entropy=True)
    assert torch.equal(ours.logprobs, expected.logprobs) and torch.equal(ours.entropy, expected.entropy)
    leaf = view.detach().requires_grad_()
    token_logprobs(leaf, labels).sum().backward()
    assert leaf.grad.isfinite().all()


def test_shifted_view_as_trainers_call_it(backend):
    """`logits[:, :-1]` is read where it lies; int32 labels from a slice of token ids."""
    logits, tokens = torch.randn(2, 9, 50, requires_grad=True), torch.randint(0, 50, (2, 9), dtype=torch.int32)
    ours = token_logprobs(logits[:, :-1], tokens[:, 1:])
    native, exact = (reference(x[:, :-1].detach(), tokens[:, 1:]) for x in (logits, logits.double()))
    assert_as_exact_as_native(ours.detach(), native, exact)
    ours.sum().backward()
    assert (logits.grad[:, -1] == 0).all()


def test_expanded_upstream_gradient(backend):
    """`.sum()` sends a gradient of stride 0."""
    logits = torch.randn(6, 40, requires_grad=True)
    labels = torch.randint(0, 40, (6,))
    (ours,) = torch.autograd.grad(token_logprobs(logits, labels).sum(), logits)
    (expected,) = torch.autograd.grad(reference(logits, labels).sum(), logits)
    assert_as_exact_as_native(ours, expected, expected.double())


def test_only_entropy_or_only_logprobs_used(backend):
    logits, labels = torch.randn(3, 33, requires_grad=True), torch.tensor([1, 2, 3])
    for pick in (0, 1):
        (ours,) = torch.autograd.grad(token_logprobs(logits, labels, return_entropy=True)[pick].sum(), logits)
        exact_logits = logits.detach().double().requires_grad_()
        (exact,) = torch.autograd.grad(reference(exact_logits, labels, return_entropy=True)[pick].sum(), exact_logits)
        (native,) = torch.autograd.grad(reference(logits, labels, return_entropy=True)[pick].sum(), logits)
        assert_as_exact_as_native(ours, native, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inplace_backward_only_when_asked(cpu_backend, dtype):
    data, labels = torch.randn(5, 70).to(dtype), torch.randint(0, 70, (5,))
    results = []
    for inplace in (False, True):
        leaf = data.clone().requires_grad_()
        logits = leaf * 1
        logits.retain_grad()
        token_logprobs(logits, labels, inplace_backward=inplace).sum().backward()
        assert torch.equal(logits.detach(), data) != inplace
        results.append(leaf.grad)
    assert torch.equal(*results)


SHARING = {
    "expanded rows": lambda x: x[:1].expand(5, 70),
    "one number a row": lambda x: x[:, :1].expand(5, 70),
    "overlapping rows": lambda x: x.as_strided((5, 70), (30, 1)),
}


@pytest.mark.parametrize("view", SHARING)
def test_inplace_backward_refuses_rows_that_share_memory(backend, view):
    """Each row's gradient would overwrite logits that another row still has to read."""
    logits = SHARING[view](torch.randn(5, 70, requires_grad=True) * 1)
    with pytest.raises(ValueError, match=r"logits has shape \[5, 70\] and strides .* expected elements that share no"):
        token_logprobs(logits, torch.zeros(5, dtype=torch.long), inplace_backward=True)


@pytest.mark.parametrize("layout", ["sliced", "time-major", "vocabulary-major"])
def test_inplace_backward_takes_any_layout_of_its_own(cpu_backend, layout):
    labels, gradients = torch.randint(0, 70, (3, 4)), []
    data = torch.randn(3, 4, 70)
    for inplace in (False, True):
        leaf = data.clone().requires_grad_()
        logits = strided_views(leaf * 1)[layout]
        token_logprobs(logits, labels, inplace_backward=inplace).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[:, :70]], ids=["leaf", "view"])
def test_inplace_backward_refuses_a_leaf(backend, view):
    """A parameter would hold its gradient afterwards."""
    leaf, labels = torch.randn(5, 90, requires_grad=True), torch.zeros(5, dtype=torch.long)
    with pytest.raises(ValueError, match="a leaf that requires a gradient, expected the result of an operation"):
        token_logprobs(view(leaf), labels, inplace_backward=True)
    with torch.no_grad():
        token_logprobs(view(leaf), labels, inplace_backward=True)


def test_inplace_backward_compiles(cpu_backend):
    data, labels = torch.randn(5, 70), torch.randint(0, 70, (5,))

    def step(leaf):
        return token_logprobs(leaf * 2, labels, inplace_backward=True).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    gradients = [
        torch.autograd.grad(f(leaf), leaf)[0] for f in (step, compiled) for leaf in [data.clone().requires_grad_()]
    ]
    assert torch.equal(*gradients)


def test_bits_do_not_depend_on_batch_or_threads(cpu_backend):
    """Batch invariance: the same row gives the same bits at every batch size and thread count."""
    logits, labels = torch.randn(9, 3000), torch.randint(0, 3000, (9,))
    whole = token_logprobs(logits, labels, return_entropy=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        single = token_logprobs(logits, labels, return_entropy=True)
    finally:
        torch.set_num_threads(threads)
    rows = [token_logprobs(logits[i : i + 1], labels[i : i + 1], return_entropy=True) for i in range(9)]
    for k in (0, 1):
        assert torch.equal(whole[k], single[k])
        assert torch.equal(whole[k], torch.cat([row[k] for row in rows]))


def test_zero_rows_and_scalars(backend):
    assert token_logprobs(torch.randn(0, 8), torch.zeros(0, dtype=torch.long)).shape == (0,)
    assert token_logprobs(torch.randn(8), torch.tensor(3)).shape == ()


def test_float64_is_exact():
    logits = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 10, 4])
    out = token_logprobs(logits, labels, return_entropy=True)
    assert out.logprobs.dtype == torch.float64
    for pick in (0, 1):
        assert torch.autograd.gradcheck(
            lambda x, pick=pick: token_logprobs(x, labels, softcap=3.0, return_entropy=True)[pick], logits
        )


def test_opcheck(cpu_backend):
    logits = torch.randn(4, 33, requires_grad=True)
    labels = torch.randint(0, 33, (4,))
    for entropy in (False, True):
        torch.library.opcheck(
            torch.ops.fastppo.token_logprobs, (logits, labels, 0.9, 0.0, 1.0, -100, entropy, False, "cpu")
        )


def test_compiles_without_graph_breaks(cpu_backend):
    compiled = torch.compile(
        lambda x, y: token_logprobs(x, y, return_entropy=True), fullgraph=True, backend="aot_eager"
    )
    logits, labels = torch.randn(4, 33, requires_grad=True), torch.randint(0, 33, (4,))
    ours, expected = compiled(logits, labels), token_logprobs(logits, labels, return_entropy=True)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
        ({"temperature": -1.0}, ValueError, "temperature is -1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature is nan"),
        ({"temperature": 1e-300}, ValueError, "temperature is 1e-300, expected a finite number >= 1e-10 and <= 1"),
        ({"temperature": 1e-39}, ValueError, "temperature is 1e-39"),
        ({"temperature": 1e39}, ValueError, "temperature is 1e.39"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0"),
        ({"softcap": 1e39}, ValueError, "softcap is 1e.39"),
        ({"softcap": 1e-39}, ValueError, "softcap is 1e-39"),
        ({"logit_scale": 1e39}, ValueError, "logit_scale is 1e.39"),
        ({"logit_scale": -1e39}, ValueError, "logit_scale is -1e.39, expected a finite number >= -1"),
        ({"labels": torch.tensor([0, 50])}, ValueError, "labels holds 50 at flat position 1"),
        ({"labels": torch.tensor([0, -1])}, ValueError, "labels holds -1"),
        ({"labels": torch.tensor([0])}, ValueError, r"labels has shape \[1\], expected \[2\]"),
        ({"labels": torch.tensor([0.0, 1.0])}, TypeError, "labels has dtype torch.float32"),
        ({"logits": torch.zeros(2, 50, dtype=torch.long)}, TypeError, "logits has dtype torch.int64"),
        ({"logits": [1.0]}, TypeError, "logits is list"),
        ({"logits": torch.zeros(2, 0)}, ValueError, "V >= 1"),
    ],
)
def test_errors_name_the_argument(cpu_backend, change, error, message):
    arguments = {"logits": torch.zeros(2, 50), "labels": torch.tensor([1, 2])} | change
    with pytest.raises(error, match=message):
        token_logprobs(**arguments)
