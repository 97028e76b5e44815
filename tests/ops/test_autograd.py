"""What holds for the gradient of every op: the node keeps its backend, and a derivative is right or refused by name."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastppo import ops
from fastppo.ops._backends import FAST_BACKENDS
from fastppo.ops._registry import register_gradient

LABELS = torch.tensor([1, 0, 4, 3])


def column(like: Tensor, *numbers: float) -> Tensor:
    return torch.tensor(numbers).to(like)


def policy_loss(x: Tensor) -> Tensor:
    old_logprobs, advantages = column(x, 0.1, -0.3, 0.2, 0.0), column(x, 1.0, -2.0, 0.5, 3.0)
    return ops.ppo_loss(x, old_logprobs, advantages).loss.square()


def head_loss(x: Tensor) -> Tensor:
    weight, advantages = torch.linspace(-1, 1, 15).view(5, 3).to(x), column(x, 1.0, -2.0, 0.5, 3.0)
    return ops.linear_ppo_loss(x, weight, LABELS, column(x, -1.0, -2.0, -1.5, -1.6), advantages).loss.square()


def attended(x: Tensor) -> Tensor:
    offsets, prompts = torch.tensor([0, 2, 4]), torch.tensor([-1, 0])
    return ops.packed_attention(x, x[:, :1], x[:, 1:], offsets, prompts=prompts).square().sum()


def normed_loss(x: Tensor) -> Tensor:
    weight, residual = torch.linspace(1, 2, 3).to(x), torch.linspace(-1, 1, 12).view(4, 3).to(x)
    normed, total = ops.rms_norm(x, weight, eps=1e-3, residual=residual)
    return (normed.square() * total).sum()


# Of each differentiable op: the shape of its input and a smooth function of it that is not linear in the op.
LOSSES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "token_logprobs": ((4, 5), lambda x: ops.token_logprobs(x, LABELS).square().sum()),
    "linear_token_logprobs": (
        (4, 3),
        lambda x: ops.linear_token_logprobs(x, torch.linspace(-1, 1, 15).view(5, 3).to(x), LABELS).square().sum(),
    ),
    "linear_ppo_loss": ((4, 3), head_loss),
    "ppo_loss": ((4,), policy_loss),
    "packed_attention": ((4, 2, 3), attended),
    "approx_kl": ((4,), lambda x: ops.approx_kl(x, column(x, 0.1, 0.2, -0.3, 0.4), "k3").square().sum()),
    "masked_whiten": ((4,), lambda x: ops.masked_mean(x).square()),
    "rms_norm": ((4, 3), normed_loss),
    "rotary_embedding": (
        (2, 2, 4),
        lambda x: ops.rotary_embedding(x, *torch.linspace(-1, 1, 24).view(2, 3, 4).to(x), LABELS[:2]).square().sum(),
    ),
    "swiglu": ((4, 3), lambda x: ops.swiglu(x, x.flip(0)).square().sum()),
}
# These two are linear: the backward of masked_mean is torch's own ops, that of rotary_embedding the same op.
REFUSED = [name for name in LOSSES if name not in ("masked_whiten", "rotary_embedding")]


@pytest.fixture
def backend_of(fast_backend) -> Iterator[Callable[[str], str]]:
    def check(op: str) -> str:
        if fast_backend not in FAST_BACKENDS[op]:
            pytest.skip(f"{op} has no {fast_backend} kernel")
        return fast_backend

    yield check


def make(op: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    shape, loss = LOSSES[op]
    return torch.randn(shape, dtype=dtype, requires_grad=True), loss


@pytest.mark.parametrize("op", LOSSES)
def test_backward_runs_where_forward_did(backend_of, op):
    """What `use_backend` says around `.backward()`, or in its thread, changes nothing."""
    backend_of(op)
    x, loss = make(op)
    (expected,) = torch.autograd.grad(loss(x), x)
    value = loss(x)
    with ops.use_backend("reference"):
        (found,) = torch.autograd.grad(value, x)
    assert torch.equal(found, expected)
    with ops.use_backend("reference"):
        value, native = loss(x), torch.autograd.grad(loss(x), x)
    assert torch.equal(torch.autograd.grad(value, x)[0], *native)


@pytest.mark.parametrize("op", LOSSES)
def test_backward_in_another_thread(backend_of, op):
    backend_of(op)
    x, loss = make(op)
    (expected,) = torch.autograd.grad(loss(x), x)
    value, found = loss(x), []
    thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(value, x)))
    thread.start()
    thread.join()
    assert len(found) == 1 and torch.equal(found[0], expected)


def test_overlapping_blocks_of_two_threads(cpu_backend):
    """Each thread has its own choice, and none is left when both blocks are over."""
    inside, left, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        seen.append(ops._backends._forced.name)
        with ops.use_backend("reference"):
            inside.set()
            left.wait(10)
        seen.append(ops._backends._forced.name)

    with ops.use_backend("cpu"):
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait(10)
        assert ops._backends.choose("gae", torch.zeros(1)) == "cpu"
    left.set()
    thread.join()
    assert seen[0] == seen[1] and ops._backends._forced.name == "cpu"


def test_compiled_code_follows_the_block(cpu_backend):
    """torch.compile guards on the choice: what was compiled under one backend is not run under another."""

    def is_reference(x: Tensor) -> Tensor:
        return torch.ones(()) if ops._backends.choose("gae", x) == "reference" else torch.zeros(())

    step = torch.compile(is_reference, fullgraph=True, backend="aot_eager")
    assert step(torch.zeros(2)) == 0
    with ops.use_backend("reference"):
        assert step(torch.zeros(2)) == 1
    assert step(torch.zeros(2)) == 0


@pytest.mark.parametrize("op", REFUSED)
def test_second_derivatives_are_refused(backend_of, op):
    """A gradient penalty beside the loss: the gradient used to count as a constant in it."""
    backend_of(op)
    x, loss = make(op)
    with pytest.raises(RuntimeError, match=rf"fastppo::{op} has no second derivative \(create_graph=True\)"):
        torch.autograd.grad(loss(x), x, create_graph=True)
    torch.autograd.grad(loss(x), x)


def test_second_derivative_of_the_mean(backend_of):
    backend_of("masked_whiten")
    x = torch.randn(5, requires_grad=True)
    (gradient,) = torch.autograd.grad(ops.masked_mean(x).square(), x, create_graph=True)
    gradient.sum().backward()
    assert torch.equal(x.grad, torch.full((5,), 0.4))


@pytest.mark.parametrize("op", LOSSES)
def test_forward_mode_is_refused(backend_of, op):
    backend_of(op)
    x, loss = make(op)
    x = x.detach()
    calls = {
        "jvp": lambda: torch.func.jvp(loss, (x,), (torch.ones_like(x),)),
        "jacfwd": lambda: torch.func.jacfwd(loss)(x),
    }
    for call in calls.values():
        with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
            call()
    with forward_ad.dual_level():
        loss(x)  # constants may pass
        with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
            loss(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("op", LOSSES)
def test_function_transforms_are_refused(backend_of, op):
    backend_of(op)
    x, loss = make(op)
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian):
        with pytest.raises(RuntimeError, match="has no derivative under torch.func"):
            transform(loss)(x.detach())


@pytest.mark.parametrize("op", LOSSES)
def test_float64_has_every_derivative(op):
    x, loss = make(op, torch.float64)
    assert torch.autograd.gradcheck(loss, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, x)
    x = x.detach()
    assert torch.func.grad(loss)(x).shape == x.shape


# Ops without a gradient


ROWS, COUNTS, TABLE = torch.ones(2, 4), torch.ones(2, dtype=torch.long), torch.zeros(2, 1, dtype=torch.int32)
CACHE = torch.zeros(1, 4, 2, 4)


def without_gradient(backend: str) -> dict[str, tuple]:
    """Arguments of each op that has none, the first of which may require one."""
    scalar, mask = torch.ones((), dtype=torch.float64), ROWS > 0
    return {
        "gae": (ROWS, ROWS, None, None, None, None, None, None, 0.9, 0.8),
        "kl_shaped_rewards": (ROWS[:, 0], ROWS, ROWS, mask, None, 0.1, 0),
        "sample_tokens": (ROWS, ROWS[:, 0], COUNTS, ROWS[:, 0], ROWS[:, 0], COUNTS, COUNTS, 0),
        "decode_attention": (ROWS.view(2, 2, 2).repeat(1, 1, 2), CACHE, CACHE, TABLE, COUNTS, 0.1, 0.0, 0, None, backend),
        "write_kv": (torch.ones(2, 2, 4), torch.ones(2, 2, 4), CACHE.clone(), CACHE.clone(), COUNTS.cumsum(0), backend),
        "batch_invariant_linear": (ROWS, ROWS, None, backend),
        "masked_whiten": (ROWS, None, scalar, scalar, scalar, False),
    }  # fmt: skip


@pytest.mark.parametrize("name", without_gradient("cpu"))
def test_an_op_without_a_gradient_refuses_one(cpu_backend, name):
    """Also where it is called under the public function, whose results are constants."""
    op = getattr(torch.ops.fastppo, name)
    first, *others = without_gradient(cpu_backend)[name]
    op(first, *others)
    leaf = first.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=f"fastppo::{name} has no derivative, but one of its inputs requires"):
        op(leaf, *others)
    with torch.no_grad():
        op(leaf, *others)


def backward_calls(backend: str) -> dict[str, tuple]:
    """Arguments of each op that a backward pass calls."""
    logits, hidden, weight = torch.randn(4, 5), torch.randn(4, 3), torch.randn(5, 3)
    one, options = torch.ones(4), (0.9, 3.0, 1.1, -100)
    saved = torch.stack([logits.amax(1), one], 1), one, one, one
    head = hidden, weight, LABELS, torch.zeros(5), saved[0], torch.empty(0, 0), *saved[1:]
    return {
        "token_logprobs_backward": (logits, LABELS, *saved, *options, backend),
        "token_logprobs_backward_": (logits.clone(), LABELS, *saved, *options, backend),
        "linear_token_logprobs_backward": (*head, *options, False, [True, True, True], True, backend),
        "approx_kl_backward": (one, logits[:, 0], one, 2),
        "rms_norm_backward": (logits, hidden.new_ones(5), logits.neg(), logits.sin(), 1e-5, True, backend),
        "swiglu_backward": (logits, logits.neg(), logits.sin(), backend),
        "scale_gradients": (one, one[:0], logits, one[0], one[0].double(), [0, 0, 1]),
    }


@pytest.mark.parametrize("name", backward_calls("cpu"))
def test_opcheck_of_the_backward_ops(cpu_backend, name):
    torch.library.opcheck(getattr(torch.ops.fastppo, name), backward_calls(cpu_backend)[name])


def test_opcheck_of_the_backward_in_place(cpu_backend):
    """The forward op whose backward pass overwrites its input."""
    logits = torch.randn(4, 5, requires_grad=True)
    arguments = (LABELS, 0.9, 0.0, 1.0, -100, True, True, cpu_backend)
    torch.library.opcheck(
        torch.ops.fastppo.token_logprobs, (logits, *arguments), test_utils=("test_schema", "test_faketensor")
    )


def test_gradients_are_checked_against_the_schema():
    from fastppo.ops.approx_kl import _approx_kl

    for name in ("logprob", "kind"):
        with pytest.raises(
            ValueError, match=f"gradient of '{name}', expected one of fastppo::approx_kl's tensors: logprobs"
        ):
            register_gradient(_approx_kl, (name,), lambda *_: None, lambda *_: None)
