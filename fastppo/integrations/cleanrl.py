"""CleanRL: two blocks of its PPO scripts as functions on our ops.

CleanRL is scripts, not a library, so nothing is patched: a script calls these in place of its own lines. The arguments have
the names that `ppo.py` gives them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastppo import ops
from fastppo.ops import _checks
from fastppo.ops.gae import GAE


class PPOLoss(NamedTuple):
    """0-d tensors; all but `loss` are detached, under the names that the script logs."""

    loss: Tensor
    pg_loss: Tensor
    v_loss: Tensor
    """With its factor 0.5."""
    entropy_loss: Tensor
    """The mean entropy."""
    old_approx_kl: Tensor
    approx_kl: Tensor
    clipfrac: Tensor


def compute_gae(
    rewards: Tensor,
    dones: Tensor,
    values: Tensor,
    next_value: Tensor,
    next_done: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
) -> GAE:
    """The script's loop under "bootstrap value if not done": (advantages, returns), float32 [T, N].

    On the CPU these are the bits of the loop. NaN and infinities after the end of an episode do not reach the steps before
    it; in the script they do, as it multiplies by 0 there.

    Args:
        rewards, values: [T, N] float32, time first; other floating types as in `fastppo.gae`.
        dones: [T, N]: whether step t is the first of an episode; 0 and 1 of any dtype.
        next_value, next_done: N elements of any shape, for the state after the last step.
        gamma, gae_lambda: in [0, 1].

    Raises:
        TypeError, ValueError: wrong type, shape, device or range.
    """
    _checks.tensor("rewards", rewards)
    if rewards.dim() != 2:
        raise ValueError(f"rewards has shape {list(rewards.shape)}, expected [T, N]")
    for name, x in {"dones": dones, "values": values}.items():
        _checks.tensor(name, x)
        _checks.shape(name, x, rewards.shape, "rewards' shape")
    for name, x in {"next_value": next_value, "next_done": next_done}.items():
        _checks.tensor(name, x)
        if x.numel() != rewards.shape[1]:
            raise ValueError(
                f"{name} has shape {list(x.shape)}, expected {rewards.shape[1]} elements, one an environment"
            )
    for name, x in {"dones": dones, "next_done": next_done}.items():
        _checks.same_device(name, x, "rewards", rewards)
    ends = torch.cat([dones[1:], next_done.reshape(1, -1)]) != 0
    options = {"dones": ends.T, "next_values": next_value.reshape(-1), "gamma": gamma, "lam": gae_lambda}
    return GAE(*(x.T.contiguous() for x in ops.gae(rewards.T, values.T, **options)))


def ppo_loss(
    newlogprob: Tensor,
    entropy: Tensor,
    newvalue: Tensor,
    mb_logprobs: Tensor,
    mb_advantages: Tensor,
    mb_returns: Tensor,
    mb_values: Tensor,
    *,
    clip_coef: float,
    clip_vloss: bool,
    norm_adv: bool,
    ent_coef: float,
    vf_coef: float,
) -> PPOLoss:
    """The script's lines from `logratio` to `loss`, for one minibatch of M samples.

        pg_loss + vf_coef * v_loss - ent_coef * entropy_loss

    Gradients flow to newlogprob, newvalue and entropy. In the loss and its parts log-ratios are held to [-20, 20], which the
    script does not do; `approx_kl` is computed with expm1, which keeps its digits where the policies are close.

    Args:
        newlogprob, entropy: [M] float32, of `agent.get_action_and_value`.
        newvalue: M elements, [M] or [M, 1].
        mb_logprobs, mb_advantages, mb_returns, mb_values: [M], `b_logprobs[mb_inds]` and so on.
        clip_coef: > 0, of the ratio and, with clip_vloss, of the value.
        norm_adv: whether the minibatch's advantages are normalised here: (A - mean) / (std + 1e-8).
        ent_coef, vf_coef: >= 0.

    Raises:
        TypeError, ValueError: wrong type, shape, device or range.
    """
    _checks.floating("mb_advantages", mb_advantages)
    _checks.tensor("newvalue", newvalue)
    if norm_adv:
        std, mean = torch.std_mean(mb_advantages)
        mb_advantages = (mb_advantages - mean) / (std + 1e-8)
    loss, stats = ops.ppo_loss(
        newlogprob,
        mb_logprobs,
        mb_advantages,
        values=newvalue.reshape(-1),
        old_values=mb_values,
        returns=mb_returns,
        entropy=entropy,
        clip_low=clip_coef,
        clip_high=clip_coef,
        value_clip=clip_coef if clip_vloss else None,
        vf_coef=vf_coef,
        entropy_coef=ent_coef,
    )
    logratio = newlogprob.detach() - mb_logprobs.detach()
    change = logratio.expm1()
    approx_kl = (change - logratio).mean()
    clipfrac = (change.abs() > clip_coef).float().mean()
    return PPOLoss(loss, stats.policy_loss, stats.value_loss, stats.entropy, stats.ppo_kl, approx_kl, clipfrac)
