"""torchrl: its estimates of advantages and returns, which `GAE` and the TD(lambda) estimators call, on our `gae`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.integrations.patching import Patch, Peer, Replacement
from fastppo.ops import _checks, gae

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FLAGS = torch.empty(1, dtype=torch.int32)  # the type in which torchrl multiplies flags with gamma and lmbda


def generalized_advantage_estimate(
    gamma: float | Tensor,
    lmbda: float | Tensor,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    *,
    time_dim: int = -2,
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """(advantage, value target) of [*B, T, F] steps: `done` cuts the recursion, `terminated` the value that follows.

    The recursion runs in float32. The advantage has next_state_value's dtype, the target that of a sum of the two values.
    NaN and infinities behind a `done` step, or in the value that follows a `terminated` one, reach no other step. In torchrl
    they do, as it multiplies by 0 there: with `strict` such numbers are refused, so that a patched torchrl computes them as
    it always did.

    Args:
        gamma, lmbda: numbers or float32 tensors [] in [0, 1].
        state_value, next_state_value, reward: float32, bfloat16 or float16, of one shape with two dimensions or more.
        done, terminated: bool of that shape. terminated=None: `done`.
        time_dim: any dimension of that shape.

    Raises:
        TypeError, ValueError: anything else, and inputs that need a gradient while gradients are enabled.
    """
    columns = {"next_state_value": next_state_value, "state_value": state_value, "reward": reward}
    advantage, target = _gae(gamma, lmbda, columns, done, terminated, time_dim, strict)
    return advantage.to(next_state_value.dtype), target.to(_dtype(next_state_value, state_value))


def vec_generalized_advantage_estimate(
    gamma: float | Tensor,
    lmbda: float | Tensor,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    *,
    time_dim: int = -2,
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """`generalized_advantage_estimate`, with both results in the dtype that gamma and the inputs have together.

    torchrl leaves out the steps that gamma * lmbda weighs less than about 1e-7 (up to 3e-4 where gamma * lmbda is that small),
    and raises IndexError where gamma * lmbda is less than 1e-7. Here every step counts, also with `strict`.
    """
    columns = {"next_state_value": next_state_value, "state_value": state_value, "reward": reward}
    found = _gae(gamma, lmbda, columns, done, terminated, time_dim, strict)
    dtype = _dtype(*columns.values(), numbers=(gamma,))
    return tuple(x.to(dtype) for x in found)


def td_lambda_return_estimate(
    gamma: float | Tensor,
    lmbda: float | Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    rolling_gamma: bool | None = None,
    *,
    time_dim: int = -2,
    strict: bool = False,
) -> Tensor:
    """TD(lambda) returns of [*B, T, F] steps, in next_state_value's dtype; the recursion runs in float32.

    All that `generalized_advantage_estimate` says of its arguments, of NaN and of `strict` holds here too. rolling_gamma=False
    is refused.
    """
    columns = {"next_state_value": next_state_value, "reward": reward}
    returns = _lambda_returns(gamma, lmbda, columns, done, terminated, rolling_gamma, time_dim, strict)
    return returns.to(next_state_value.dtype)


def vec_td_lambda_return_estimate(
    gamma: float | Tensor,
    lmbda: float | Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    rolling_gamma: bool | None = None,
    *,
    time_dim: int = -2,
    strict: bool = False,
) -> Tensor:
    """`td_lambda_return_estimate`, in the dtype that gamma, lmbda and the inputs have together.

    Here too every step counts, unlike in torchrl (see `vec_generalized_advantage_estimate`).
    """
    columns = {"next_state_value": next_state_value, "reward": reward}
    returns = _lambda_returns(gamma, lmbda, columns, done, terminated, rolling_gamma, time_dim, strict)
    return returns.to(_dtype(*columns.values(), numbers=(gamma, lmbda)))


def _gae(
    gamma: float | Tensor,
    lmbda: float | Tensor,
    columns: dict[str, Tensor],
    done: Tensor,
    terminated: Tensor | None,
    time_dim: int,
    strict: bool,
) -> list[Tensor]:
    """Advantage and value target, float32 in the inputs' shape."""
    gamma, lmbda = _number("gamma", gamma), _number("lmbda", lmbda)
    _check_steps(columns, done, terminated, time_dim, strict)
    following, values, rewards, done = (_rows(x, time_dim) for x in (*columns.values(), done))
    ends = {"dones": done}
    if terminated is not None:
        ends = {"truncated": done}
        following = torch.where(_rows(terminated, time_dim), 0, following)
    found = gae(rewards, values, gamma=gamma, lam=lmbda, next_values=following, **ends)
    return [_from_rows(x, columns["reward"], time_dim) for x in found]


def _lambda_returns(
    gamma: float | Tensor,
    lmbda: float | Tensor,
    columns: dict[str, Tensor],
    done: Tensor,
    terminated: Tensor | None,
    rolling_gamma: bool | None,
    time_dim: int,
    strict: bool,
) -> Tensor:
    """float32 in the inputs' shape. The recursion of `gae` without values sums what each step adds:

    G_t = r_t + gamma * (1 - lmbda) * V_{t+1} + gamma * lmbda * G_{t+1}, or r_t + gamma * V_{t+1} at the end of an episode
    """
    if rolling_gamma is not None and not rolling_gamma:
        raise ValueError("rolling_gamma is False, expected True or None")
    gamma, lmbda = _number("gamma", gamma), _number("lmbda", lmbda)
    _check_steps(columns, done, terminated, time_dim, strict)
    following, rewards, done = (_rows(x, time_dim) for x in (*columns.values(), done))
    following = torch.where(done if terminated is None else _rows(terminated, time_dim), 0, following.float())
    share = torch.where(done, gamma, gamma * (1 - lmbda)).float()
    share[:, -1:] = gamma
    added = torch.addcmul(rewards.float(), share, following)
    returns = gae(added, torch.zeros_like(added), gamma=gamma, lam=lmbda, dones=done).advantages
    return _from_rows(returns, columns["reward"], time_dim)


def _number(name: str, x: float | Tensor) -> float:
    if not isinstance(x, Tensor):
        return _checks.number(name, x, at_least=0, at_most=1)
    if x.dim() != 0 or x.dtype != torch.float32 or (x.requires_grad and torch.is_grad_enabled()):
        raise ValueError(
            f"{name} is {x.dtype} {list(x.shape)}, expected a number or a float32 tensor [] without gradient"
        )
    if torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        raise ValueError(f"{name} is a tensor, expected a number in what torch.compile or a CUDA graph records")
    return _checks.number(name, x.item(), at_least=0, at_most=1)


def _check_steps(
    columns: dict[str, Tensor], done: Tensor, terminated: Tensor | None, time_dim: int, strict: bool
) -> None:
    like = next(iter(columns.values()))
    flags = {"done": done} if terminated is None else {"done": done, "terminated": terminated}
    for name, x in columns.items():
        _checks.tensor(name, x)
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} has dtype {x.dtype}, expected float32, bfloat16 or float16")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} needs a gradient, expected none: advantages and returns are constants")
        if strict and not x.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinities, expected finite numbers with strict=True")
    for name, x in flags.items():
        _checks.mask(name, x)
    for name, x in {**columns, **flags}.items():
        _checks.shape(name, x, like.shape, "next_state_value's shape")
        _checks.same_device(name, x, "next_state_value", like)
    if like.dim() < 2:
        raise ValueError(f"next_state_value has shape {list(like.shape)}, expected [*B, T, F]")
    _checks.integer_number("time_dim", time_dim, at_least=-like.dim(), at_most=like.dim() - 1)


def _dtype(*tensors: Tensor, numbers: tuple[float | Tensor, ...] = ()) -> torch.dtype:
    """That of a sum of the tensors, each times a flag and the numbers as torchrl multiplies them."""
    dtypes = [x.dtype for x in tensors] + [torch.result_type(_FLAGS, x) for x in numbers]
    found = dtypes[0]
    for dtype in dtypes[1:]:
        found = torch.promote_types(found, dtype)
    if found not in _DTYPES:  # numbers count as torch's default dtype
        raise TypeError(f"the result would have dtype {found}, expected float32, bfloat16 or float16")
    return found


def _rows(x: Tensor, time_dim: int) -> Tensor:
    """[*B, T, F], whose time is at `time_dim`, as rows [.., T]."""
    return x.movedim(time_dim, -1).flatten(0, -2)


def _from_rows(rows: Tensor, like: Tensor, time_dim: int) -> Tensor:
    return rows.view(like.movedim(time_dim, -1).shape).movedim(-1, time_dim).contiguous()


_MODULE = "torchrl.objectives.value.functional"
_PEER = Peer(
    "torchrl",
    "torchrl",
    {
        "0.14": (
            Replacement(f"{_MODULE}:generalized_advantage_estimate", generalized_advantage_estimate),
            Replacement(f"{_MODULE}:vec_generalized_advantage_estimate", vec_generalized_advantage_estimate),
            Replacement(f"{_MODULE}:td_lambda_return_estimate", td_lambda_return_estimate),
            Replacement(f"{_MODULE}:vec_td_lambda_return_estimate", vec_td_lambda_return_estimate),
        )
    },
)


def patch(strict: bool = False) -> Patch:
    """Puts ours into the installed torchrl, for its estimator modules too."""
    return _PEER.patch(strict)


def unpatch() -> None:
    _PEER.unpatch()
