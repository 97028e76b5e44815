"""stable-baselines3: the advantages of its rollout buffers on our `gae`."""

from __future__ import annotations

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor

from fastppo.integrations.patching import Patch, Peer, Replacement
from fastppo.ops import gae


def compute_returns_and_advantage(self, last_values: Tensor, dones: ndarray, *, strict: bool = False) -> None:
    """`RolloutBuffer.compute_returns_and_advantage`: fills `self.advantages` and sets `self.returns`, with the same bits.

    `self` is a buffer whose float32 arrays have shape [buffer_size, n_envs]: `rewards`, `values` and `episode_starts`, which
    is 1 where an episode begins. `last_values` (float32, n_envs elements, any device) and `dones` [n_envs] belong to the
    states after the last step.

    NaN and infinities after the end of an episode do not reach the steps before it. In stable-baselines3 they do, as it
    multiplies by 0 there: with `strict` such numbers are refused, so that a patched buffer computes them as it always did.

    Raises:
        TypeError, ValueError: other dtypes or shapes, flags other than 0 and 1, gamma or gae_lambda outside [0, 1].
    """
    last_values = _last_values(last_values, self.n_envs)
    shape = (self.buffer_size, self.n_envs)
    for name in ("rewards", "values", "episode_starts", "advantages"):
        _check_array(name, getattr(self, name), shape)
    _check_number("gamma", self.gamma)
    _check_number("gae_lambda", self.gae_lambda)
    if strict and not all(np.isfinite(x).all() for x in (self.rewards, self.values, last_values.numpy())):
        raise ValueError("a reward or value is NaN or infinite, expected finite numbers with strict=True")
    rewards, values, ends = (torch.from_numpy(x).T for x in (self.rewards, self.values, _ends(self, dones)))
    found = gae(rewards, values, gamma=self.gamma, lam=self.gae_lambda, dones=ends, next_values=last_values)
    torch.from_numpy(self.advantages).copy_(found.advantages.T)
    self.returns = self.advantages + self.values


def _last_values(last_values: object, n_envs: int) -> Tensor:
    if not isinstance(last_values, Tensor) or last_values.dtype != torch.float32 or last_values.numel() != n_envs:
        raise TypeError(f"last_values is {_kind(last_values)}, expected a float32 tensor with {n_envs} elements")
    return last_values.detach().cpu().flatten()


def _check_array(name: str, x: object, shape: tuple[int, int]) -> None:
    if not isinstance(x, ndarray) or x.dtype != np.float32 or x.shape != shape:
        raise TypeError(f"{name} is {_kind(x)}, expected a NumPy array, float32 {list(shape)}")


def _check_number(name: str, x: object) -> None:
    if isinstance(x, np.generic):
        raise TypeError(f"{name} is {x!r}, in whose precision NumPy would compute, expected a number of Python")


def _ends(self, dones: object) -> ndarray:
    """bool [buffer_size, n_envs]: whether the episode ends with this step."""
    if not isinstance(dones, ndarray) or dones.shape != (self.n_envs,):
        raise TypeError(f"dones is {_kind(dones)}, expected a NumPy array [{self.n_envs}]")
    numbers = np.concatenate([self.episode_starts[1:], dones[None]])
    ends = numbers != 0
    if not np.array_equal(ends, numbers):
        raise ValueError("episode_starts or dones holds other numbers than 0 and 1")
    return ends


def _kind(x: object) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, ndarray | Tensor) else type(x).__name__


_PEER = Peer(
    "stable_baselines3",
    "stable-baselines3",
    {
        "2.9": (
            Replacement(
                "stable_baselines3.common.buffers:RolloutBuffer.compute_returns_and_advantage",
                compute_returns_and_advantage,
            ),
        )
    },
)


def patch(strict: bool = False) -> Patch:
    """Puts ours into the installed stable-baselines3; `DictRolloutBuffer` and other subclasses inherit it."""
    return _PEER.patch(strict)


def unpatch() -> None:
    _PEER.unpatch()
