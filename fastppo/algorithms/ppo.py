"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347), with a critic or a baseline, over the actions of packed rollouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.algorithms import advantages as estimators
from fastppo.algorithms.controllers import Controller, EntropyController, KLController, restore, states
from fastppo.config import GROUP_ESTIMATORS, PPOConfig
from fastppo.evaluation import Evaluation
from fastppo.learner import Learner, Losses
from fastppo.ops import approx_kl, kl_shaped_rewards, masked_whiten, ppo_loss
from fastppo.plan import Lengths, Minibatch, Plan
from fastppo.rewards.scores import Scores
from fastppo.roles import Roles
from fastppo.rollout.record import on_device
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
KL_LOSS_METRICS = {"loss/kl_avg": "kl_loss"}
CORRECTION_METRICS = {"rollout/weight_avg": "rollout_weight_mean", "rollout/weight_clipfrac": "rollout_clipfrac"}


class Denominators(NamedTuple):
    """Of a whole minibatch: numbers, or 0-d tensors where the device alone knows which sequences count."""

    loss: float | Tensor
    tokens: float | Tensor
    """Of the sequences that count."""
    positive_tokens: float | Tensor
    """Of those that are to become likelier."""


class PPO:
    """Advantages of KL-shaped rewards, and the clipped losses of policy and value; see `PPOConfig` for every term."""

    def __init__(self, config: PPOConfig) -> None:
        self.config, loss, reward = config, config.loss, config.reward
        self.has_critic = config.critic.kind != "none"
        self.reward_kl = KLController(reward.kl_coef, reward.kl_target, reward.kl_horizon)
        self.loss_kl = KLController(loss.kl_coef, loss.kl_target, loss.kl_horizon)
        self.entropy = EntropyController(loss.entropy_coef, loss.entropy_target, loss.entropy_coef_step)
        wanted = {
            "values": self.has_critic,
            "final_values": config.advantage.bootstrap_truncated,
            "reference": reward.kl_coef > 0 or loss.kl_coef > 0,
            "greedy_scores": config.advantage.estimator == "remax",
        }
        self.needs = frozenset({"logprobs"} | {name for name, needed in wanted.items() if needed})
        self.loss_metrics = LOSS_METRICS | (CRITIC_LOSS_METRICS if self.has_critic else {})
        self.loss_metrics |= KL_LOSS_METRICS if loss.kl_coef > 0 else {}
        self.token_metrics = TOKEN_METRICS | (CRITIC_TOKEN_METRICS if self.has_critic else CRITICLESS_TOKEN_METRICS)
        self.token_metrics |= CORRECTION_METRICS if loss.rollout_correction else {}

    def credit(self, rollout: Rollout, evaluation: Evaluation, scores: Scores) -> Targets:
        """Advantages (whitened when asked) of all actions, and returns where there is a critic.

        The end-of-sequence token ends the episode: nothing is bootstrapped after it. A completion that hit the length limit is truncated:
        with `advantage.bootstrap_truncated` its last state's value stands for what would have come.
        """
        loss, bounds = self.config.loss, rollout.action_cu_seqlens
        rewards = self.shaped_rewards(rollout, evaluation, scores)
        advantages, returns = self._estimate(rewards, rollout, evaluation, scores)
        kept = rollout.finish_reasons != FinishReason.LENGTH if loss.mask_truncated_completions else None
        positive = scores.values > loss.positive_nll_threshold if loss.positive_nll_coef > 0 else None
        if self.config.advantage.whiten:
            advantages = masked_whiten(advantages, _of_actions(kept, rollout))
        sampled = None
        if loss.rollout_correction:
            level = loss.rollout_correction_level
            sampled = estimators.sampling_logprobs(evaluation.logprobs, rollout.processed_logprobs, bounds, level)
        return Targets(
            rollout.action_bounds,
            advantages=advantages,
            returns=returns,
            rollout_logprobs=sampled,
            kept=kept,
            positive=positive,
        )

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
        if config.estimator == "vtrace":
            log_weights = evaluation.logprobs - rollout.processed_logprobs
            return estimators.v_trace(rewards, evaluation.values, final_values, log_weights, bounds, config)
        return estimators.generalised(rewards, evaluation.values, final_values, bounds, config)

    def shaped_rewards(self, rollout: Rollout, evaluation: Evaluation, scores: Scores) -> Tensor:
        """fp32 [N]: the KL penalty at each action, and the score at the last."""
        reward, logprobs = self.config.reward, evaluation.logprobs
        rewards = kl_shaped_rewards(
            scores.values,
            logprobs,
            logprobs if evaluation.ref_logprobs is None else evaluation.ref_logprobs,
            torch.ones_like(logprobs, dtype=torch.bool),
            coef=self.reward_kl.coef,
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
        records = rollout, evaluation, targets
        metrics = self._minimise(learner, *records, plan, progress, train_policy=train_policy)
        return metrics | self._move_coefficients(rollout, evaluation, metrics, train_policy)

    def _minimise(
        self,
        learner: Learner,
        rollout: Rollout,
        evaluation: Evaluation,
        targets: Targets,
        plan: Plan,
        progress: Callable[[int, int], None] | None,
        *,
        train_policy: bool,
    ) -> dict[str, float]:
        def losses(roles: Roles, minibatch: Minibatch) -> Losses:
            return self.losses(roles, rollout, evaluation, targets, minibatch, train_policy=train_policy)

        learned = learner.optimizers.keys() if train_policy else {"critic"}
        return learner.minimise(losses, plan, Lengths.of(rollout), learned=learned, progress=progress)

    def _move_coefficients(
        self, rollout: Rollout, evaluation: Evaluation, metrics: Mapping[str, float], train_policy: bool
    ) -> dict[str, float]:
        """Let those that have a target follow what the step has shown; returns what they were in it."""
        kls = {"objective/kl_coef": self.reward_kl, "loss/kl_coef": self.loss_kl}
        kls = {name: controller for name, controller in kls.items() if controller.target is not None}
        were = {name: controller.coef for name, controller in kls.items()}
        if kls:
            estimates = approx_kl(evaluation.logprobs, evaluation.ref_logprobs, self.config.reward.kl_estimator)
            for controller in kls.values():
                controller.update(estimates.sum().item() / rollout.num_sequences, rollout.num_sequences)
        if self.entropy.target is not None:
            were["loss/entropy_coef"] = self.entropy.coef
            if train_policy and "policy/entropy_avg" in metrics:  # else nobody has looked at it
                self.entropy.update(metrics["policy/entropy_avg"])
        return were

    def state_dict(self) -> dict[str, dict[str, float]]:
        """The coefficients that move."""
        return states(self._controllers())

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]]) -> None:
        restore(self._controllers(), state)

    def _controllers(self) -> dict[str, Controller]:
        return {"reward_kl": self.reward_kl, "loss_kl": self.loss_kl, "entropy": self.entropy}

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
        denominators = self._denominators(rollout, targets, [index for indices in minibatch for index in indices])
        for indices in minibatch:
            batch = rollout.select(indices), evaluation.select(indices), targets.select(indices)
            yield self.loss(roles, *batch, denominators=denominators, train_policy=train_policy)

    def _denominators(self, rollout: Rollout, targets: Targets, indices: list[int]) -> Denominators:
        counts = [rollout.action_counts[index] for index in indices]
        tokens, sequences, positive = sum(counts), sum(count > 0 for count in counts), 0
        if targets.kept is not None or targets.positive is not None:
            chosen = on_device(indices, rollout.tokens.device)
            lengths = rollout.action_cu_seqlens.diff()[chosen]
            if targets.kept is not None:
                lengths = torch.where(targets.kept[chosen], lengths, 0)
                # With nothing to divide, 1 will do as well as any.
                tokens, sequences = lengths.sum().clamp(min=1), (lengths > 0).sum().clamp(min=1)
            if targets.positive is not None:
                positive = torch.where(targets.positive[chosen], lengths, 0).sum().clamp(min=1)
        denominators = {"token-mean": tokens, "fixed-denominator": sequences * self.config.rollout.max_new_tokens}
        return Denominators(denominators.get(self.config.loss.aggregation, sequences), tokens, positive)

    def loss(
        self,
        roles: Roles,
        rollout: Rollout,
        evaluation: Evaluation,
        targets: Targets,
        *,
        denominators: Denominators,
        train_policy: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) of one packed micro-batch; only its N actions reach the head and the loss."""
        config, loss = self.config, self.config.loss
        outputs = roles(rollout, policy=train_policy, values=self.has_critic)
        kept = _of_actions(targets.kept, rollout)
        total, stats = ppo_loss(
            outputs.logprobs if train_policy else evaluation.logprobs,
            evaluation.logprobs,
            targets.advantages,
            kept,
            values=outputs.values,
            old_values=evaluation.values,
            returns=targets.returns,
            ref_logprobs=evaluation.ref_logprobs if loss.kl_coef > 0 else None,
            entropy=outputs.entropy,
            rollout_logprobs=targets.rollout_logprobs,
            cu_seqlens=rollout.action_cu_seqlens,
            clip_low=loss.clip_low,
            clip_high=loss.clip_high,
            dual_clip=loss.dual_clip,
            value_clip=config.critic.value_clip,
            vf_coef=config.critic.vf_coef,
            kl_coef=self.loss_kl.coef if train_policy else 0.0,
            kl_kind=loss.kl_estimator,
            entropy_coef=self.entropy.coef if train_policy else 0.0,
            ratio_level=loss.ratio_level,
            objective=loss.objective,
            rollout_correction=loss.rollout_correction,
            rollout_bounds=loss.rollout_bounds,
            aggregation=loss.aggregation,
            denominator=denominators.loss,
        )
        metrics = {name: getattr(stats, field) for name, field in self.loss_metrics.items()}
        share = stats.tokens / denominators.tokens
        metrics |= {name: getattr(stats, field) * share for name, field in self.token_metrics.items()}
        if targets.positive is not None and train_policy:
            positive = _of_actions(targets.positive, rollout)
            positive = positive if kept is None else positive & kept
            nll = -torch.where(positive, outputs.logprobs, 0).sum() / denominators.positive_tokens
            total, metrics["loss/positive_nll_avg"] = total + loss.positive_nll_coef * nll, nll.detach()
        return total, metrics


def _of_actions(of_sequences: Tensor | None, rollout: Rollout) -> Tensor | None:
    """[B] -> [N]: what holds of a sequence, of each of its actions."""
    if of_sequences is None:
        return None
    return of_sequences.repeat_interleave(rollout.action_cu_seqlens.diff(), output_size=rollout.num_actions)
