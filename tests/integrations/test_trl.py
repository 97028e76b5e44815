"""TRL's functions and ours on the same inputs: results and gradients, each against the exact one by the rule of tests/tolerance.py."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastppo.integrations import trl as ours
from tests.tolerance import assert_as_exact_as_model, assert_as_exact_as_native, assert_rounds_to

pytest.importorskip("trl", reason="TRL is not installed")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
fixed = settings(derandomize=True, database=None, deadline=None, max_examples=30)
widths = st.sampled_from([1, 2, 37, 1025])
temperatures = st.sampled_from([1.0, 0.6, 2])
seeds = st.integers(0, 2**31)


def test_the_version_that_is_compared_with():
    assert version("trl").startswith("1.16.")


def test_ours_need_no_trl():
    code = "import sys, fastppo.integrations.trl; sys.exit('trl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def assert_parity(
    mine: Callable,
    theirs: Callable,
    exact: Callable,
    inputs: Sequence[Tensor],
    scalar: bool = False,
    rule: Callable = assert_as_exact_as_native,
) -> None:
    """Results, their types and the gradients of all inputs; the upstream gradient is 1, or random for each element.

    What TRL computes in fp64 is exact itself: ours then have all digits of fp32.
    """
    truth = _differentiated(exact, [x.double() for x in inputs], scalar)
    results = zip(_differentiated(mine, inputs, scalar), _differentiated(theirs, inputs, scalar), truth, strict=True)
    for what, tensors in zip(("output", "gradient"), results, strict=True):
        for i, (our, their, true) in enumerate(zip(*tensors, strict=True)):
            assert our.dtype == their.dtype and our.shape == their.shape, (
                our.dtype,
                their.dtype,
                our.shape,
                their.shape,
            )
            if our.dtype == torch.float64:
                assert_rounds_to(our.float(), true, f"{what} {i}")
            else:
                rule(our, their, true, f"{what} {i}")


def _differentiated(function: Callable, inputs: Sequence[Tensor], scalar: bool) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = function(*leaves)
    results = [x for x in (results if isinstance(results, tuple) else (results,)) if x is not None]
    differentiable = [x for x in results if x.requires_grad]
    generator = torch.Generator().manual_seed(1)
    upstream = [
        torch.ones_like(x) if scalar else torch.randn(x.shape, generator=generator).to(x) for x in differentiable
    ]
    return [x.detach() for x in results], list(torch.autograd.grad(differentiable, leaves, upstream))


def exact_logprobs(logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None = None) -> Tensor:
    logprobs = (logits / temperature).log_softmax(-1)
    several = index.dim() == logits.dim()
    logprobs = logprobs.gather(-1, index.long()) if several else logprobs.gather(-1, index.long()[..., None])[..., 0]
    return logprobs if row_mask is None else logprobs.masked_fill(row_mask == 0, 0)


def exact_entropy(logits: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None) -> Tensor:
    logprobs = (logits / temperature).log_softmax(-1)
    entropy = -torch.where(logprobs == -torch.inf, 0, logprobs.exp() * logprobs).sum(-1)
    return entropy if row_mask is None else entropy.masked_fill(row_mask == 0, 0)


@st.composite
def batches(draw) -> tuple[Tensor, Callable[[Tensor], Tensor], Tensor, Tensor | None, float]:
    """(leaf, its view [B, T, V] as trainers pass it, index [B, T], row_mask of any type or None, temperature)."""
    rows, length, width = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(widths)
    torch.manual_seed(draw(seeds))
    layout = draw(st.sampled_from(["whole", "all but the last", "time first"]))
    shape, view = {
        "whole": ((rows, length, width), lambda x: x),
        "all but the last": ((rows, length + 1, width), lambda x: x[:, :-1]),
        "time first": ((length, rows, width), lambda x: x.transpose(0, 1)),
    }[layout]
    leaf = (3 * torch.randn(shape)).to(draw(st.sampled_from([*FLOATS, torch.float64])))
    index = torch.randint(0, width, (rows, length + 1))[:, 1:]
    mask_dtype = draw(st.sampled_from([None, torch.bool, torch.int64, torch.int32, torch.float32]))
    row_mask = None if mask_dtype is None else torch.randint(0, 2, (rows, length)).to(mask_dtype)
    return leaf, view, index, row_mask, draw(temperatures)


@fixed
@given(batches(), st.booleans())
def test_selective_log_softmax(batch, scalar: bool):
    from trl.trainer.utils import selective_log_softmax as theirs

    leaf, view, index, row_mask, temperature = batch
    assert_parity(
        lambda x: ours.selective_log_softmax(view(x), index, temperature, row_mask),
        lambda x: theirs(view(x), index, temperature, row_mask),
        lambda x: exact_logprobs(view(x), index, temperature, row_mask),
        [leaf],
        scalar,
    )


@fixed
@given(batches(), st.integers(1, 3), st.booleans())
def test_selective_log_softmax_at_several(batch, several: int, scalar: bool):
    """Index [B, T, K], the same token more than once too, and tokens that are impossible."""
    from trl.trainer.utils import selective_log_softmax as theirs

    leaf, view, index, row_mask, temperature = batch
    assume(leaf.shape[-1] > 1)  # else the exact gradient is 0, and TRL's too
    index = torch.randint(0, leaf.shape[-1], (*index.shape, several))
    row_mask = None if row_mask is None else torch.randint(0, 2, index.shape).to(row_mask.dtype)
    if leaf.shape[-1] > 2:
        leaf[..., 1] = -torch.inf
    assert_parity(
        lambda x: ours.selective_log_softmax(view(x), index, temperature, row_mask),
        lambda x: theirs(view(x), index, temperature, row_mask),
        lambda x: exact_logprobs(view(x), index, temperature, row_mask),
        [leaf],
        scalar,
        assert_as_exact_as_model,
    )


@fixed
@given(batches(), st.sampled_from([1, 3, 128]), st.booleans())
def test_entropy_from_logits(batch, chunk_size: int, scalar: bool):
    from trl.trainer.utils import entropy_from_logits as theirs

    leaf, view, *_ = batch
    assert_parity(
        lambda x: ours.entropy_from_logits(view(x), chunk_size),
        lambda x: theirs(view(x), chunk_size),
        lambda x: exact_entropy(view(x)),
        [leaf],
        scalar,
    )


@fixed
@given(batches(), st.booleans(), st.booleans())
def test_selective_log_softmax_and_entropy(batch, entropy_requires_grad: bool, scalar: bool):
    from trl.trainer.utils import selective_log_softmax_and_entropy as theirs

    leaf, view, index, row_mask, temperature = batch

    def exact(x: Tensor) -> tuple[Tensor, Tensor]:
        entropy = exact_entropy(view(x), temperature, row_mask)
        logprobs = exact_logprobs(view(x), index, temperature, row_mask)
        return logprobs, entropy if entropy_requires_grad else entropy.detach()

    options = index, entropy_requires_grad, temperature, row_mask
    mine = ours.selective_log_softmax_and_entropy
    assert_parity(lambda x: mine(view(x), *options), lambda x: theirs(view(x), *options), exact, [leaf], scalar)


def test_the_triton_kernels_function_gives_float32():
    """Theirs needs a GPU: on the CPU ours has the results of TRL's other function, of the logits in float32."""
    from trl.trainer.utils import selective_log_softmax_and_entropy as theirs

    logits = torch.randn(2, 3, 50).bfloat16()
    index, row_mask = torch.randint(0, 50, (2, 3)), torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert_parity(
        lambda x: ours.triton_log_softmax_and_entropy(x, index, 0.7, row_mask),
        lambda x: theirs(x.float(), index, True, 0.7, row_mask),
        lambda x: (exact_logprobs(x, index, 0.7, row_mask), exact_entropy(x, 0.7, row_mask)),
        [logits],
    )


def on_a_gpu(x: Tensor) -> SimpleNamespace:
    """What can be asked of a tensor there."""
    same = {name: getattr(x, name) for name in ("dtype", "shape", "ndim", "dim", "stride")}
    return SimpleNamespace(**same, device=torch.device("cuda"), is_cuda=True)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("mask_dtype", [None, torch.bool, torch.int64, torch.float32])
def test_on_a_gpu_results_have_the_type_of_trls_triton_kernel(dtype: torch.dtype, mask_dtype: torch.dtype | None):
    """Where it takes the logits, by TRL's own word."""
    from trl.trainer.utils import _supports_trl_loss_kernel as takes

    whole = torch.empty(2, 3, 4, 8, dtype=dtype)
    for x in (whole, whole[0], whole[0, 0], whole[0, :, :-1], whole[0].transpose(1, 2)):
        index = torch.zeros(x.shape[:-1], dtype=torch.int64)
        row_mask = None if mask_dtype is None else on_a_gpu(index.to(mask_dtype))
        expected = torch.float32 if takes(on_a_gpu(x), on_a_gpu(index), row_mask) else dtype
        assert ours._result_dtype(on_a_gpu(x), row_mask) == expected
        assert ours._result_dtype(x, row_mask) == dtype


@st.composite
def heads(draw) -> tuple[list[Tensor], Tensor, dict]:
    """([hidden, weight, bias or none], targets, options) of the chunked head."""
    rows, depth, width = draw(st.sampled_from([0, 1, 5])), draw(st.sampled_from([1, 16])), draw(widths)
    torch.manual_seed(draw(seeds))
    dtype = draw(st.sampled_from(FLOATS))
    head = [
        torch.randn(rows, depth).to(dtype),
        (torch.randn(width, depth) / depth**0.5).to(draw(st.sampled_from([dtype, torch.float32]))),
    ]
    head += [torch.randn(width).to(dtype)] if draw(st.booleans()) else []
    options = {
        "temperature": draw(temperatures),
        "chunk_size": draw(st.sampled_from([16, 32768])),
        "final_logit_softcapping": draw(st.sampled_from([None, 3.0, 30])),
        "logit_scale": draw(st.sampled_from([1.0, 0.25, 0.0])),
        "outputs": draw(st.sampled_from([("log_probs",), ("log_probs", "entropy"), ("entropy",), ()])),
    }
    return head, torch.randint(0, width, (rows,)), options


def exact_head(head: Sequence[Tensor], targets: Tensor, options: dict) -> tuple[Tensor, ...]:
    hidden, weight, *bias = head
    z = (hidden @ weight.T + (bias[0] if bias else 0)) * options["logit_scale"]
    cap, temperature = options["final_logit_softcapping"], options["temperature"]
    z = z if cap is None else cap * torch.tanh(z / cap)
    logprobs = exact_logprobs(z, targets, temperature)
    return (logprobs, exact_entropy(z, temperature)) if "entropy" in options["outputs"] else (logprobs,)


@fixed
@given(heads(), st.booleans())
def test_the_chunked_head(case, scalar: bool):
    from trl.kernels import ChunkedLogProbFunction as Theirs

    head, targets, options = case

    def call(function: type) -> Callable:
        def with_bias(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple:
            return function.apply(hidden, weight, bias, targets, *options.values())

        return with_bias

    for function in (ours.ChunkedLogProbFunction, Theirs):
        given_outputs = [x is not None for x in call(function)(*head)]
        assert given_outputs == [True, "entropy" in options["outputs"], False, False, False]
    assert_parity(
        call(ours.ChunkedLogProbFunction), call(Theirs), lambda *x: exact_head(x, targets, options), head, scalar
    )


def test_the_chunked_head_under_autocast_and_without_an_entropy_gradient():
    """As GRPO calls it: an fp32 model under bf16 autocast, an entropy that is only logged, a frozen weight."""
    from trl.kernels import ChunkedLogProbFunction as Theirs

    weight, targets = torch.randn(37, 16), torch.randint(0, 37, (5,))
    options = {"temperature": 0.9, "chunk_size": 32768, "final_logit_softcapping": None, "logit_scale": 1.0}

    def call(function: type) -> Callable:
        def logged(hidden: Tensor) -> tuple[Tensor, Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                logprobs, entropy, *_ = function.apply(hidden, weight, None, targets, *options.values(), ("entropy",))
            return logprobs, entropy.detach()

        return logged

    def exact(hidden: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropy = exact_head([hidden, weight.double()], targets, options | {"outputs": ("entropy",)})
        return logprobs, entropy.detach()

    assert_parity(call(ours.ChunkedLogProbFunction), call(Theirs), exact, [torch.randn(5, 16)])


def test_masked_rows_reach_nothing():
    """TRL says that they are skipped; on the CPU its own gradients there are NaN."""
    logits = torch.randn(2, 3, 9)
    logits[:, 1] = torch.nan
    index, row_mask = torch.randint(0, 9, (2, 3)), torch.tensor([[1, 0, 1]] * 2)
    for function in (ours.selective_log_softmax_and_entropy, ours.triton_log_softmax_and_entropy):
        leaf = logits.clone().requires_grad_()
        logprobs, entropy = function(leaf, index, row_mask=row_mask)
        (logprobs.sum() + entropy.sum()).backward()
        assert (logprobs[:, 1] == 0).all() and (entropy[:, 1] == 0).all() and (leaf.grad[:, 1] == 0).all()
        assert leaf.grad.isfinite().all()


def test_impossible_tokens_leave_the_entropy_finite():
    """TRL's is 0 * -inf = NaN; strict leaves these logits to TRL."""
    from trl.trainer.utils import entropy_from_logits as theirs

    logits = torch.randn(2, 3, 9)
    logits[..., 4] = -torch.inf
    leaf = logits.clone().requires_grad_()
    entropy = ours.entropy_from_logits(leaf)
    entropy.sum().backward()
    assert_as_exact_as_native(entropy.detach(), entropy.detach(), exact_entropy(logits.double()))
    assert leaf.grad.isfinite().all() and theirs(logits).isnan().all()
    with pytest.raises(ValueError, match="logits is not finite everywhere, as expected with strict=True"):
        ours.entropy_from_logits(logits, strict=True)


LOGITS, INDEX = torch.randn(2, 3, 9), torch.zeros(2, 3, dtype=torch.int64)


class Shard(Tensor):
    """A class of tensors that our kernels know nothing about."""


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ours.selective_log_softmax(LOGITS.long(), INDEX), "logits has dtype torch.int64"),
        (lambda: ours.selective_log_softmax(LOGITS[0, 0], INDEX[0, 0]), r"logits has shape \[9\], expected"),
        (lambda: ours.selective_log_softmax(LOGITS, INDEX.byte()), "index has dtype torch.uint8|labels has dtype"),
        (lambda: ours.selective_log_softmax(LOGITS, INDEX - 100), "labels holds -100"),
        (lambda: ours.selective_log_softmax(LOGITS, INDEX[:, :2]), r"labels has shape \[2, 2\]"),
        (lambda: ours.selective_log_softmax(LOGITS, INDEX[:, :2, None]), r"index has shape \[2, 2, 1\]"),
        (lambda: ours.selective_log_softmax(LOGITS, INDEX, 0.0), "temperature is 0.0"),
        (lambda: ours.selective_log_softmax(LOGITS, INDEX, row_mask=INDEX[:1]), r"row_mask has shape \[1, 3\]"),
        (lambda: ours.selective_log_softmax(LOGITS.as_subclass(Shard), INDEX), "logits is Shard, expected"),
        (lambda: ours.selective_log_softmax(LOGITS.to("meta"), INDEX), "logits is on meta"),
        (lambda: ours.selective_log_softmax_and_entropy(LOGITS, INDEX[..., None]), r"labels has shape \[2, 3, 1\]"),
        (lambda: ours.triton_log_softmax_and_entropy(LOGITS.double(), INDEX), "logits has dtype torch.float64"),
    ],
)
def test_what_ours_does_not_take_is_refused(call: Callable, message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def head_call(**changes):
    arguments = {
        "hidden": LOGITS[0],
        "weight": torch.randn(5, 9),
        "bias": None,
        "targets": INDEX[0],
        "temperature": 1.0,
    }
    arguments |= {"chunk_size": 8, "outputs": ("entropy",)} | changes
    return ours.ChunkedLogProbFunction.apply(**arguments)


def test_what_the_chunked_head_does_not_take_is_refused():
    split = torch.nn.Parameter(torch.empty(0))
    split.ds_status = "NOT_AVAILABLE"
    for changes, message in [
        ({"outputs": ours.OPTIONAL_OUTPUTS}, "outputs holds 'log_sum_sq_probs', 'mean_logits', 'is_top1'"),
        ({"hidden": LOGITS[0].double()}, "hidden has dtype torch.float64"),
        ({"targets": INDEX[0] - 100}, "labels holds -100"),
        ({"final_logit_softcapping": 0.0}, "softcap is 0.0"),
        ({"weight": split}, "weight is a parameter of DeepSpeed's ZeRO-3"),
        ({"weight": torch.randn(5, 9).as_subclass(Shard)}, "weight is Shard"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            head_call(**changes)


def test_a_patched_package_runs_ours_and_unpatched_its_own():
    """In every module that holds a function; the kernels keep their own answer to where Triton runs."""
    import trl.experimental.sdft.loss_utils as user
    import trl.kernels.chunked_logprob as kernels
    import trl.trainer.utils as utils

    names = ["selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy", "_use_triton"]
    theirs = {name: getattr(utils, name) for name in names}
    cpu = torch.device("cpu")
    with ours.patch() as patch:
        assert all(getattr(utils, name) is not theirs[name] for name in names)
        assert user.selective_log_softmax is utils.selective_log_softmax
        assert utils._use_triton(cpu) and not kernels._use_triton(cpu)
        logits = LOGITS.clone().requires_grad_()
        assert "fastppo" in type(user.selective_log_softmax(logits, INDEX).grad_fn).__name__
        head = utils._ChunkedLogProbFunction.apply(
            logits[0], torch.randn(5, 9), None, INDEX[0], 1.0, 8, None, 1.0, ("entropy",)
        )
        assert "fastppo" in type(head[0].grad_fn).__name__
        assert "trl.kernels.chunked_logprob:ChunkedLogProbFunction.apply" in patch
    assert all(getattr(utils, name) is theirs[name] for name in names)
    assert (
        user.selective_log_softmax is theirs["selective_log_softmax"] and kernels._use_triton is theirs["_use_triton"]
    )
    assert "apply" not in vars(kernels.ChunkedLogProbFunction)


def test_what_is_refused_goes_to_trl(caplog: pytest.LogCaptureFixture):
    """The outputs of the chunked head that DPO logs: all five are TRL's own, and the first call is logged."""
    from trl.kernels import ChunkedLogProbFunction

    arguments = LOGITS[0], torch.randn(5, 9), None, INDEX[0], 1.0, 8
    expected = ChunkedLogProbFunction.apply(*arguments)
    with caplog.at_level(logging.WARNING), ours.patch():
        for _ in range(2):
            assert all(map(torch.equal, ChunkedLogProbFunction.apply(*arguments), expected))
    assert len(caplog.records) == 1 and "outputs holds 'log_sum_sq_probs'" in caplog.text


def test_strict_leaves_what_is_not_finite_to_trl():
    import trl.trainer.utils as utils

    logits = LOGITS.clone()
    logits[..., 0] = -torch.inf
    with ours.patch():
        assert utils.entropy_from_logits(logits).isfinite().all()
    with ours.patch(strict=True):
        assert utils.entropy_from_logits(logits).isnan().all()
        assert utils.entropy_from_logits(LOGITS).isfinite().all()
