"""`approx_kl` and `kl_shaped_rewards`: against fp64, against the true KL of a categorical, where the score lands."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastppo.ops import approx_kl, kl_shaped_rewards
from fastppo.ops.approx_kl import KINDS
from fastppo.reference.approx_kl import approx_kl as reference
from fastppo.reference.approx_kl import kl_shaped_rewards as reference_rewards
from tests.cases import DTYPES, with_threads
from tests.isa import assert_same_bits_on_every_isa
from tests.tolerance import assert_as_exact_as_native, assert_rounds_to

SHAPES = [(1,), (17,), (3, 5, 16), (40, 33), (0,), (4, 0)]


def run(function, logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Value and both gradients under an uneven upstream gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in (logprobs, ref_logprobs)]
    kl = function(*leaves, kind)
    up = torch.linspace(-1, 2, kl.numel(), dtype=kl.dtype).view(kl.shape)
    (kl * up).sum().backward()
    return kl.detach(), leaves[0].grad, leaves[1].grad


def compare(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> None:
    ours, native = (run(f, logprobs, ref_logprobs, kind) for f in (approx_kl, reference))
    exact = run(reference, logprobs.double(), ref_logprobs.double(), kind)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == logprobs.dtype and ours[2].dtype == ref_logprobs.dtype
    for name, a, b, c in zip(("kl", "gradient", "gradient of ref"), ours, native, exact, strict=True):
        assert_as_exact_as_native(a, b, c, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend, shape, dtype, kind):
    compare(-torch.rand(shape).mul(9).to(dtype), -torch.rand(shape).mul(9).to(dtype), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 100.0])
def test_small_and_large_differences(backend, kind, scale):
    """From where exp(u) - 1 - u cancels to beyond the clamps; equal log-probabilities in between."""
    logprobs = -torch.rand(300) * 3
    ref_logprobs = logprobs + torch.randn(300) * scale
    ref_logprobs[::7] = logprobs[::7]
    compare(logprobs, ref_logprobs, kind)


def test_formulas(backend):
    d = torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0, 11.5, 30.0, -30.0]).double()
    zero = torch.zeros(8)
    k3 = (torch.exp((-d).clamp(-20, 20)) - 1 + d.clamp(-20, 20)).clamp(max=10)
    expected = {"k1": d, "k2": d * d / 2, "k3": k3, "abs": d.abs(), "k1+": d, "k3+": k3}
    slope = torch.where((d < -2.6) | (d > 11), 0, 1 - torch.exp(-d))
    slopes = {"k1": zero + 1, "k2": d, "k3": slope, "abs": d.sign(), "k1+": d, "k3+": d}
    for kind in KINDS:
        kl, grad, grad_ref = run(lambda *x: approx_kl(*x) * 8, d.float(), zero, kind)
        up = torch.linspace(-1, 2, 8)
        assert_rounds_to(kl / 8, expected[kind])
        assert_rounds_to(grad / 8, up * slopes[kind])
        assert torch.equal(grad_ref, -grad)


@pytest.mark.parametrize("kind", KINDS)
def test_infinite_log_probabilities(backend, kind):
    """No less in fp64, which is the reference's own: a straight-through form once subtracted its infinity from itself."""
    logprobs, ref_logprobs = (
        x.flatten()
        for x in torch.cartesian_prod(torch.tensor([-torch.inf, -1.5, 0.0]), torch.tensor([-torch.inf, -0.5])).T
    )
    values = (approx_kl(logprobs, ref_logprobs, kind), reference(logprobs.double(), ref_logprobs.double(), kind))
    assert torch.equal(values[1].isnan(), logprobs.isinf() & ref_logprobs.isinf())
    assert_as_exact_as_native(values[0], values[0], values[1])
    compare(logprobs, ref_logprobs, kind)


def test_k3_is_never_negative(backend):
    logprobs = -torch.rand(10000)
    kl = approx_kl(logprobs, logprobs + torch.randn(10000) * torch.logspace(-8, 0, 10000), "k3")
    assert (kl >= -1e-12).all()


def test_long_sequences(backend):
    """Scores land on the last trainable token however much padding follows it, and however long its sequence is."""
    case = make_rewards_case(3, 5000)
    case["mask"][:] = False
    for row, last in enumerate((0, 2047, 4999)):
        case["mask"][row, : last + 1 : 3 if last % 3 == 0 else 1] = True
    assert torch.equal(kl_shaped_rewards(**case), reference_rewards(**case))


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_expectation_is_the_kl(kind):
    """Under the policy, k1 and k3 average to the KL exactly."""
    policy, other = (torch.randn(20, dtype=torch.float64).log_softmax(0) for _ in range(2))
    true_kl = (policy.exp() * (policy - other)).sum()
    assert_rounds_to((policy.exp() * approx_kl(policy, other, kind)).sum(), true_kl)


@pytest.mark.parametrize("kind", ["k2", "k1+", "k3+"])
def test_expected_gradient_is_that_of_the_kl(kind):
    """Under the policy, k2's gradient averages to the KL's, and so in the straight-through forms; k3's does not."""
    logits, other = torch.randn(20, dtype=torch.float64, requires_grad=True), torch.randn(20).double().log_softmax(0)
    policy = logits.log_softmax(0)
    (true,) = torch.autograd.grad((policy.exp() * (policy - other)).sum(), logits, retain_graph=True)

    def expected_gradient(kind):
        kl = approx_kl(policy, other, kind)
        return torch.autograd.grad((policy.exp().detach() * kl).sum(), logits, retain_graph=True)[0]

    assert_rounds_to(expected_gradient(kind), true)
    assert (expected_gradient("k3") - true).abs().max() > 0.01


def test_float64_gradients():
    logprobs, ref_logprobs = (torch.randn(9, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for kind in ("k1", "k2", "k3", "abs"):
        assert torch.autograd.gradcheck(lambda a, b, kind=kind: approx_kl(a, b, kind), (logprobs, ref_logprobs))


@pytest.mark.parametrize("kind", KINDS)
def test_nan_shows(backend, kind):
    logprobs = torch.zeros(40)
    logprobs[3] = torch.nan
    kl, grad, _ = run(approx_kl, logprobs, torch.full((40,), -1.0), kind)
    assert kl.isnan().nonzero().tolist() == [[3]] and grad[4:].isfinite().all()


def test_strides_mixed_types_and_expanded_upstream(backend):
    logprobs, ref_logprobs = torch.randn(6, 20).T.requires_grad_(), torch.randn(20, 1).bfloat16().expand(20, 6)
    kl = approx_kl(logprobs, ref_logprobs, "k2")
    d = logprobs.detach().double() - ref_logprobs
    assert_rounds_to(kl.detach(), 0.5 * d.square())
    kl.sum().backward()
    assert_rounds_to(logprobs.grad, d)


def make_rewards_case(batch: int, length: int) -> dict:
    """Prompts, holes from tool output, padding, and one sequence with nothing to train on."""
    mask = torch.rand(batch, length) < 0.8
    mask[:, : length // 5] = False
    mask &= torch.arange(length) < torch.randint(1, length + 1, (batch, 1))
    mask[batch // 2] = False
    logprobs, ref_logprobs = -torch.rand(batch, length) * 4, -torch.rand(batch, length) * 4
    return {"scores": torch.randn(batch), "logprobs": logprobs, "ref_logprobs": ref_logprobs, "mask": mask, "coef": 0.3}


def to_fp64(case: dict) -> dict:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in case.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 17), (7, 64), (40, 500), (1, 0)], ids=str)
def test_shaped_rewards(backend, shape, kind):
    case = make_rewards_case(*shape) if shape[1] else make_rewards_case(1, 1) | dict.fromkeys(
        ("logprobs", "ref_logprobs"), torch.zeros(1, 0)) | {"mask": torch.zeros(1, 0, dtype=torch.bool)}  # fmt: skip
    ours = kl_shaped_rewards(**case, kind=kind)
    assert ours.dtype == torch.float32 and ours.shape == shape
    exact = reference_rewards(**to_fp64(case), kind=kind)
    assert_as_exact_as_native(ours, reference_rewards(**case, kind=kind), exact, "rewards")


def test_shaped_rewards_token_by_token(backend):
    case = make_rewards_case(6, 30)
    wide = to_fp64(case)
    expected = torch.zeros(6, 30, dtype=torch.float64)
    for i in range(6):
        steps = case["mask"][i].nonzero().view(-1).tolist()
        for t in steps:
            expected[i, t] = -0.3 * (wide["logprobs"][i, t] - wide["ref_logprobs"][i, t])
        if steps:
            expected[i, steps[-1]] += wide["scores"][i]
    assert_rounds_to(kl_shaped_rewards(**case), expected)


def test_the_score_lands_on_the_last_trainable_token(backend):
    """Never on a pad, a prompt or a tool's token (trl#3750), and nowhere in a sequence without trainable tokens."""
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 1, 1], [0, 1, 0, 0, 0]], dtype=torch.bool)
    scores = torch.tensor([1.0, torch.nan, 3.0, 4.0])
    logprobs = torch.full((4, 5), -2.0)
    expected = torch.tensor([[0.0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 3], [0, 4, 0, 0, 0]])
    assert torch.equal(kl_shaped_rewards(scores, logprobs, logprobs, mask, coef=0.5), expected)


def test_an_invalid_score_marks_its_own_token(backend):
    case = make_rewards_case(4, 20)
    case["scores"][0] = torch.nan
    nan = kl_shaped_rewards(**case).isnan()
    assert nan.sum() == case["mask"][0].any() and not nan[1:].any()


def test_packed_equals_padded(backend):
    lengths = torch.tensor([5, 0, 40, 1, 17, 33, 0])
    case = make_rewards_case(7, 40)
    inside = torch.arange(40) < lengths[:, None]
    case["mask"] &= inside
    padded = kl_shaped_rewards(**case, kind="k3")
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    packed_case = {k: v[inside] if isinstance(v, Tensor) and v.dim() == 2 else v for k, v in case.items()}
    for cu_seqlens in (offsets, offsets.int()):
        packed = kl_shaped_rewards(**packed_case, kind="k3", cu_seqlens=cu_seqlens)
        assert torch.equal(packed, padded[inside])
    none = torch.zeros(0)
    empty = kl_shaped_rewards(none, none, none, none.bool(), coef=1.0, cu_seqlens=torch.tensor([0]))
    assert empty.shape == (0,)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_nothing_under_the_mask_is_read(backend, poison):
    case = make_rewards_case(9, 50)
    dirty = {k: case[k].masked_fill(~case["mask"], poison) for k in ("logprobs", "ref_logprobs")}
    ours = kl_shaped_rewards(**case | dirty, kind="k3")
    assert torch.equal(ours, kl_shaped_rewards(**case, kind="k3")) and (ours[~case["mask"]] == 0).all()


def test_without_a_coefficient_nothing_is_multiplied(backend):
    """0 * inf is NaN: with coef = 0 the log-probabilities are not looked at."""
    case = make_rewards_case(5, 20) | {"coef": 0.0}
    clean = kl_shaped_rewards(**case)
    ours = kl_shaped_rewards(**case | {"ref_logprobs": torch.full((5, 20), -torch.inf)})
    assert torch.equal(ours, clean) and ours.isfinite().all() and ours.count_nonzero() == case["mask"].any(1).sum()


def test_rewards_are_detached_and_take_any_type(backend):
    case = make_rewards_case(3, 20)
    expected = kl_shaped_rewards(**case | {"scores": case["scores"].bfloat16().float()})
    ours = kl_shaped_rewards(
        case["scores"].bfloat16(), case["logprobs"].requires_grad_(), case["ref_logprobs"].T.contiguous().T,
        case["mask"].T.contiguous().T, coef=0.3,
    )  # fmt: skip
    assert not ours.requires_grad and torch.equal(ours, expected)
    assert kl_shaped_rewards(**case | {"scores": case["scores"].double()}).dtype == torch.float64


def isa_outputs() -> list[Tensor]:
    torch.manual_seed(0)
    case = make_rewards_case(20, 77)
    outputs = [kl_shaped_rewards(**case, kind=kind) for kind in KINDS]
    for kind in KINDS:
        outputs += run(approx_kl, case["logprobs"] * 3, case["ref_logprobs"] * 3, kind)
    return outputs


def test_same_bits_on_every_instruction_set(cpu_backend):
    assert_same_bits_on_every_isa(__name__)


def test_bits_do_not_depend_on_threads(cpu_backend):
    case = make_rewards_case(90, 700)

    def outputs():
        return approx_kl(case["logprobs"], case["ref_logprobs"], "k3"), kl_shaped_rewards(**case, kind="k3")

    single, several = with_threads(1, outputs), with_threads(3, outputs)
    assert torch.equal(single[0], several[0]) and torch.equal(single[1], several[1])


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_opcheck(fast_backend, kind):
    logprobs, ref_logprobs = torch.randn(3, 20, requires_grad=True), torch.randn(3, 20, requires_grad=True)
    torch.library.opcheck(torch.ops.fastppo.approx_kl, (logprobs, ref_logprobs, kind))


def test_opcheck_of_the_rewards(fast_backend):
    x, mask = torch.randn(2, 20), torch.rand(2, 20) < 0.5
    torch.library.opcheck(torch.ops.fastppo.kl_shaped_rewards, (x[:, 0], x, x, mask, None, 0.1, 2))
    offsets = torch.tensor([0, 20])
    torch.library.opcheck(torch.ops.fastppo.kl_shaped_rewards, (x[:1, 0], x[0], x[1], mask[0], offsets, 0.1, 0))


def test_compiles_without_graph_breaks(fast_backend):
    def function(scores, logprobs, ref_logprobs, mask):
        rewards = kl_shaped_rewards(scores, logprobs, ref_logprobs, mask, coef=0.1, kind="k3")
        return rewards, approx_kl(logprobs, ref_logprobs, "k3+")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((3, 20), (5, 31)):
        case = make_rewards_case(*shape)
        case.pop("coef")
        case["logprobs"].requires_grad_()
        ours, expected = compiled(**case), function(**case)
        assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
        grads = [torch.autograd.grad(out[1].sum(), case["logprobs"])[0] for out in (ours, expected)]
        assert torch.equal(*grads)


Y = torch.zeros(2, 6)
MASK = torch.ones(2, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"coef": -0.1}, ValueError, "coef is -0.1"),
        ({"coef": None}, TypeError, "coef is None"),
        ({"kind": "k4"}, ValueError, "kind is 'k4', expected one of 'k1', 'k2'"),
        ({"scores": torch.zeros(3)}, ValueError, r"scores has shape \[3\], expected \[2\]"),
        ({"scores": torch.zeros(2, dtype=torch.long)}, TypeError, "scores has dtype torch.int64"),
        ({"ref_logprobs": Y[:, 1:]}, ValueError, r"ref_logprobs has shape \[2, 5\], expected \[2, 6\]"),
        ({"logprobs": [0.0]}, TypeError, "logprobs is list"),
        ({"mask": Y}, TypeError, "mask has dtype torch.float32"),
        ({"mask": MASK[:1]}, ValueError, r"mask has shape \[1, 6\]"),
        ({"mask": MASK.to("meta")}, ValueError, "mask is on meta"),
        (
            {"logprobs": Y[0], "ref_logprobs": Y[0], "mask": MASK[0]},
            ValueError,
            r"logprobs has shape \[6\], expected \[B, T\]",
        ),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, r"logprobs has shape \[2, 6\], expected \[total\]"),
    ],
)
def test_errors_name_the_argument(backend, change, error, message):
    with pytest.raises(error, match=message):
        kl_shaped_rewards(
            **{"scores": torch.zeros(2), "logprobs": Y, "ref_logprobs": Y, "mask": MASK, "coef": 0.1} | change
        )


@pytest.mark.parametrize("offsets", [[1, 4, 6], [0, 4, 5], [0, 7, 6]], ids=str)
def test_wrong_offsets_are_refused(backend, offsets):
    """ValueError, or NaN everywhere where the host does not wait for the device."""
    arguments = {"coef": 0.1, "cu_seqlens": torch.tensor(offsets)}
    if backend == "cuda":
        assert kl_shaped_rewards(torch.zeros(2), Y[0], Y[0], MASK[0], **arguments).isnan().all()
        return
    with pytest.raises(ValueError, match="cu_seqlens"):
        kl_shaped_rewards(torch.zeros(2), Y[0], Y[0], MASK[0], **arguments)


def test_approx_kl_errors(backend):
    with pytest.raises(ValueError, match=r"ref_logprobs has shape \[1, 6\], expected \[2, 6\]"):
        approx_kl(Y, Y[:1])
    with pytest.raises(ValueError, match="kind is 'kl'"):
        approx_kl(Y, Y, "kl")
