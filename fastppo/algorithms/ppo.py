"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347), with a critic or a baseline, over the actions of packed rollouts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastppo.algorithms import advantages as estimators
from fastppo.config import GROUP_ESTIMATORS, PPOConfig
from fastppo.evaluation import Evaluation
from fastppo.learner import Learner, Losses
from fastppo.ops import kl_shaped_rewards, masked_whiten, ppo_loss
from fastppo.plan import Minibatch, Plan
from fastppo.rewards.scores import Scores
from fastppo.roles import Roles
from fastppo.rollout.rollout import FinishReason, Rollout
from fastppo.targets import Targets

# Metric name -> field of the loss op's statistics. Losses add up over micro-batches; everything else is a mean over tokens.
LOSS_METRICS = {"loss/policy_avg": "policy_loss"}
TOKEN_METRICS = {
    "policy/approxkl_avg": "approx_kl",
    "policy/clipfrac_avg": "clipfrac",
    "policy/entropy_avg": "entropy",
}
CRITIC_LOSS_METRICS = {"loss/value_avg": "value_loss"}
CRITIC_TOKEN_METRICS = {"val/clipfrac_avg": "value_clipfrac", "val/ratio": "ratio_mean"}
# TRL's name for the policy's ratio is among those of the critic.
CRITICLESS_TOKEN_METRICS = {"policy/ratio_avg": "ratio_mean"}


class PPO:
    """Advantages of KL-shaped rewards, and the clipped losses of policy and value; see `PPOConfig` for every term."""

    def __init__(self, config: PPOConfig) -> None:
        self.config = config
        estimator, self.has_critic = config.advantage.estimator, config.critic.kind != "none"
        wanted = {
            "values": self.has_critic,
            "final_values": config.advantage.bootstrap_truncated,
            "reference": config.reward.kl_coef > 0,
            "greedy_scores": estimator == "remax",
        }
        self.needs = frozenset({"logprobs"} | {name for name, needed in wanted.items() if needed})
        losses, means = LOSS_METRICS, TOKEN_METRICS
        self.loss_metrics = losses | CRITIC_LOSS_METRICS if self.has_critic else losses
        self.token_metrics = means | (CRITIC_TOKEN_METRICS if self.has_critic else CRITICLESS_TOKEN_METRICS)

    def credit(self, rollout: Rollout, evaluation: Evaluation, scores: Scores) -> Targets:
        """Advantages (whitened when asked) of all actions, and returns where there is a critic.

        The end-of-sequence token ends the episode: nothing is bootstrapped after it. A completion that hit the length limit is truncated:
        with `advantage.bootstrap_truncated` its last state's value stands for what would have come.
        """
        rewards = self.shaped_rewards(rollout, evaluation, scores)
        advantages, returns = self._estimate(rewards, rollout, evaluation, scores)
        if self.config.advantage.whiten:
            advantages = masked_whiten(advantages, None)
        return Targets(rollout.action_bounds, advantages=advantages, returns=returns)

    def _estimate(
        self, rewards: Tensor, rollout: Rollout, evaluation: Evaluation, scores: Scores
    ) -> tuple[Tensor, Tensor | None]:
        """(advantages, returns or None) [N], not yet whitened."""
        config, bounds = self.config.advantage, rollout.action_cu_seqlens
        if config.estimator in GROUP_ESTIMATORS:
            return estimators.against_group(rewards, rollout.prompt_index, bounds, config.estimator), None
        if config.estimator == "remax":
            return estimators.remax(rewards, scores.baselines, bounds, config.gamma), None
        if config.estimator == "reinforce++":
            return estimators.reinforce_plus_plus(rewards, bounds, config.gamma), None
        final_values = None
        if config.bootstrap_truncated:
            cut_off = rollout.finish_reasons == FinishReason.LENGTH
            final_values = torch.where(cut_off, evaluation.final_values, 0)
        return estimators.generalised(rewards, evaluation.values, final_values, bounds, config)

    def shaped_rewards(self, rollout: Rollout, evaluation: Evaluation, scores: Scores) -> Tensor:
        """fp32 [N]: the KL penalty at each action, and the score at the last."""
        reward, logprobs = self.config.reward, evaluation.logprobs
        rewards = kl_shaped_rewards(
            scores.values,
            logprobs,
            logprobs if evaluation.ref_logprobs is None else evaluation.ref_logprobs,
            torch.ones_like(logprobs, dtype=torch.bool),
            coef=reward.kl_coef,
            kind=reward.kl_estimator,
            cu_seqlens=rollout.action_cu_seqlens,
        )
        return masked_whiten(rewards, None, shift_mean=False) if reward.whiten else rewards

    def update(
        self,
        learner: Learner,
        rollout: Rollout,
        evaluation: Evaluation,
        targets: Targets,
        plan: Plan,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, float]:
        """An optimizer step for each minibatch of the plan; in the critic's warm-up the policy's weights stay as they are."""
        train_policy = learner.step >= self.config.critic.warmup_steps

        def losses(roles: Roles, minibatch: Minibatch) -> Losses:
            return self.losses(roles, rollout, evaluation, targets, minibatch, train_policy=train_policy)

        learned = learner.optimizers.keys() if train_policy else {"critic"}
        return learner.minimise(losses, plan, learned=learned, progress=progress)

    def losses(
        self,
        roles: Roles,
        rollout: Rollout,
        evaluation: Evaluation,
        targets: Targets,
        minibatch: Minibatch,
        *,
        train_policy: bool = True,
    ) -> Losses:
        """(loss, metrics) of each micro-batch: both add up to the minibatch's, however it is split.

        Every micro-batch's loss is divided by the denominator of the whole minibatch.
        """
        counts = rollout.action_counts
        counts = [counts[index] for indices in minibatch for index in indices]
        tokens = sum(counts)
        token_mean = self.config.loss.aggregation == "token-mean"
        denominator = tokens if token_mean else sum(count > 0 for count in counts)
        for indices in minibatch:
            batch = rollout.select(indices), evaluation.select(indices), targets.select(indices)
            loss, stats = self.loss(roles, *batch, denominator=denominator, train_policy=train_policy)
            metrics = {name: getattr(stats, field) for name, field in self.loss_metrics.items()}
            share = stats.tokens / tokens
            metrics |= {name: getattr(stats, field) * share for name, field in self.token_metrics.items()}
            yield loss, metrics

    def loss(
        self,
        roles: Roles,
        rollout: Rollout,
        evaluation: Evaluation,
        targets: Targets,
        *,
        denominator: float,
        train_policy: bool = True,
    ) -> tuple[Tensor, object]:
        """(loss, statistics) of one packed micro-batch; only its N actions reach the head and the loss."""
        config = self.config
        outputs = roles(rollout, policy=train_policy, values=self.has_critic)
        return ppo_loss(
            outputs.logprobs if train_policy else evaluation.logprobs,
            evaluation.logprobs,
            targets.advantages,
            values=outputs.values,
            old_values=evaluation.values,
            returns=targets.returns,
            entropy=outputs.entropy,
            cu_seqlens=rollout.action_cu_seqlens,
            clip_low=config.loss.clip_low,
            clip_high=config.loss.clip_high,
            dual_clip=config.loss.dual_clip,
            value_clip=config.critic.value_clip,
            vf_coef=config.critic.vf_coef,
            entropy_coef=config.loss.entropy_coef if train_policy else 0.0,
            aggregation=config.loss.aggregation,
            denominator=denominator,
        )
