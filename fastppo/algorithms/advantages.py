"""Advantages of packed actions: generalised estimation with a critic, and baselines that need none.

N actions of B sequences, each of which has one at least; `cu_seqlens` int32 [B + 1] are the bounds of their actions. Results are fp32, or
fp64 for fp64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastppo.config import AdvantageConfig
from fastppo.ops import gae

# Beside the standard deviation, as in verl: scores that differ by rounding alone must not become signal.
GRPO_EPSILON = 1e-6


def generalised(
    rewards: Tensor, values: Tensor, final_values: Tensor | None, cu_seqlens: Tensor, config: AdvantageConfig
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) [N] of generalised estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16), each with its own λ.

    rewards, values: [N]. final_values: [B], the value after each sequence's last action, None for 0.
    """

    def estimate(lam: float | Tensor):
        return gae(rewards, values, gamma=config.gamma, lam=lam, next_values=final_values, cu_seqlens=cu_seqlens)

    adaptive, of_critic = config.length_adaptive_alpha, config.critic_gae_lambda
    both = estimate(config.gae_lambda if adaptive is None else length_adaptive_lambda(cu_seqlens.diff(), adaptive))
    if adaptive is None and of_critic in (None, config.gae_lambda):
        return both.advantages, both.returns
    return both.advantages, estimate(config.gae_lambda if of_critic is None else of_critic).returns


def v_trace(
    rewards: Tensor,
    values: Tensor,
    final_values: Tensor | None,
    log_weights: Tensor,
    cu_seqlens: Tensor,
    config: AdvantageConfig,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) [N] of actions that another policy drew (IMPALA, Espeholt et al. 2018, arXiv:1802.01561, section 4.1 and eq. 1):

        rho_t = min(rho_bar, w_t),  c_t = λ min(c_bar, w_t)
        v_t = V_t + rho_t (r_t + γ V_{t+1} - V_t) + γ c_t (v_{t+1} - V_{t+1})
        A_t = rho_t (r_t + γ v_{t+1} - V_t),  return_t = v_t

    where v = V after the last action. With w = 1 the returns are GAE's.

    rewards, values, log_weights: [N], log w of the policy that learns to the one that sampled. final_values: [B], or None for 0.
    """
    lengths = cu_seqlens.diff().long()
    sequences = torch.arange(len(lengths), dtype=torch.int64, device=rewards.device)
    row = sequences.repeat_interleave(lengths, output_size=len(rewards))
    column = torch.arange(len(rewards), dtype=torch.int64, device=rewards.device) - cu_seqlens[:-1].long()[row]
    last = column == lengths[row] - 1
    ends = torch.zeros_like(rewards) if final_values is None else final_values[row].to(rewards.dtype)
    following = torch.where(last, ends, values.roll(-1))
    weights = log_weights.exp()
    rho = weights.clamp(max=config.vtrace_rho_bar)
    decays = config.gamma * config.gae_lambda * weights.clamp(max=config.vtrace_c_bar)
    errors = rho * (rewards + config.gamma * following - values)
    above = _backwards(errors, decays, (row, column), len(lengths))  # v_t - V_t
    after = following + torch.where(last, 0, above.roll(-1))
    return rho * (rewards + config.gamma * after - values), values + above


def _backwards(x: Tensor, decays: Tensor, places: tuple[Tensor, Tensor], sequences: int) -> Tensor:
    """y_t = x_t + decay_t y_{t+1} [N] of each sequence, in as many steps as the longest has actions; `places` (row, column) of each action."""
    width = int(places[1].max()) + 1
    padded, factors = (tensor.new_zeros(sequences, width).index_put(places, tensor) for tensor in (x, decays))
    found, carried = [], x.new_zeros(sequences)
    for t in reversed(range(width)):
        carried = padded[:, t] + factors[:, t] * carried
        found.append(carried)
    return torch.stack(found[::-1], dim=1)[places]


def length_adaptive_lambda(lengths: Tensor, alpha: float) -> Tensor:
    """fp32 [B]: λ = 1 - 1 / (α length) (VAPO, arXiv:2504.05118, section "length-adaptive GAE"), at least 0.

    A completion of at most 1/α tokens, whose λ would not be above 0, gets 0: each of its advantages is one step's TD error. So does one of no
    token.
    """
    return (1 - 1 / (alpha * lengths.double())).clamp(min=0).float()


def rewards_to_go(rewards: Tensor, cu_seqlens: Tensor, gamma: float = 1.0) -> Tensor:
    """[N]: Σ_{s >= t} γ^(s - t) r_s, of each action's own sequence."""
    return gae(rewards, torch.zeros_like(rewards), gamma=gamma, lam=1.0, cu_seqlens=cu_seqlens).advantages


def reinforce_plus_plus(rewards: Tensor, cu_seqlens: Tensor, gamma: float) -> Tensor:
    """[N]: the rewards to come, KL penalties among them; whitened over the batch, which is their baseline, by the caller (REINFORCE++,
    arXiv:2501.03262)."""
    return rewards_to_go(rewards, cu_seqlens, gamma)


def remax(rewards: Tensor, baselines: Tensor, cu_seqlens: Tensor, gamma: float) -> Tensor:
    """[N]: the rewards to come less the score of the prompt's greedy completion (ReMax, arXiv:2310.10505, algorithm 1).

    baselines: [B]
    """
    return rewards_to_go(rewards, cu_seqlens, gamma) - baselines.repeat_interleave(
        cu_seqlens.diff(), output_size=len(rewards)
    )


def against_group(rewards: Tensor, groups: Tensor, cu_seqlens: Tensor, estimator: str) -> Tensor:
    """[N]: every action of a sequence gets what its sequence's whole reward is above that of its group; see `group_advantages`.

    groups: int64 [B], the same number for the samples of one prompt.
    """
    lengths = cu_seqlens.diff()
    totals = rewards_to_go(rewards, cu_seqlens)[cu_seqlens[:-1].long()]
    above = group_advantages(totals, groups, lengths, estimator)
    return above.repeat_interleave(lengths, output_size=len(rewards))


def group_advantages(totals: Tensor, groups: Tensor, lengths: Tensor, estimator: str) -> Tensor:
    """[B]: R less a baseline made of the rewards of the sequence's group, computed in fp64.

    With the group's G rewards R_j and lengths l_j:

        grpo     (R - mean R_j) / (std R_j + 1e-6), the std with G - 1 (DeepSeekMath, arXiv:2402.03300, section 4.1.2)
        dr_grpo  R - mean R_j (Dr. GRPO, arXiv:2503.20783, section 3.2)
        rloo     R - mean of the others' R_j (Ahmadian et al. 2024, arXiv:2402.14740; Kool et al. 2019)
        opo      R - Σ l_j R_j / Σ l_j (OPO, arXiv:2505.23585)

    A sequence that is alone in its group (the others had no valid score) has nothing to be compared with: 0.

    totals, groups, lengths: [B]
    """
    rewards, lengths = totals.double(), lengths.double()
    members = torch.unique(groups, return_inverse=True)[1]
    membership = F.one_hot(members).double().T  # [groups, B]

    def total(x: Tensor) -> Tensor:
        """For each sequence, the sum over its group: exact for numbers that were fp32, so that equal rewards leave exactly 0."""
        return (membership @ x)[members]

    size = total(torch.ones_like(rewards))
    above = rewards - total(rewards) / size
    others = (size - 1).clamp(min=1)
    if estimator == "grpo":
        above = above / ((total(above.square()) / others).sqrt() + GRPO_EPSILON)
    elif estimator == "rloo":
        above = above * size / others
    elif estimator == "opo":
        above = rewards - total(lengths * rewards) / total(lengths)
    return torch.where(size > 1, above, 0).to(totals.dtype)


def sampling_logprobs(old_logprobs: Tensor, sampled_logprobs: Tensor, cu_seqlens: Tensor, level: str) -> Tensor:
    """[N]: what makes exp(old_logprobs - it) the importance weight of each action at that `level`, for the mismatch of sampling and training.

        token      exp(old - sampled)
        sequence   exp(Σ (old - sampled)) over the action's sequence: the completion's probability ratio
        geometric  exp(mean (old - sampled)): its geometric mean over the actions

    sampled_logprobs: [N], of the distribution that was sampled from.
    """
    if level == "token":
        return sampled_logprobs
    lengths = cu_seqlens.diff()
    gap = rewards_to_go(old_logprobs - sampled_logprobs, cu_seqlens)[cu_seqlens[:-1].long()]
    gap = gap / lengths if level == "geometric" else gap
    return old_logprobs - gap.repeat_interleave(lengths, output_size=len(old_logprobs))
