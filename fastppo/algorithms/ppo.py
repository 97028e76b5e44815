"""Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347), with a critic or a baseline, over the actions of packed rollouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.algorithms import advantages as estimators
from fastppo.algorithms.controllers import (
    Controller,
    CriticWarmup,
    EntropyController,
    KLController,
    restore,
    states,
)
from fastppo.config import GROUP_ESTIMATORS, PPOConfig
from fastppo.critics import histogram_of
from fastppo.evaluation import Evaluation
from fastppo.learner import Learner, Losses
from fastppo.metrics import explained_variance
from fastppo.ops import approx_kl, kl_shaped_rewards, masked_whiten, ppo_loss
from fastppo.plan import Lengths, Microbatch, Minibatch, Plan
from fastppo.reference.ppo_loss import Aggregation
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
CRITIC_TOKEN_METRICS = {"val/clipfrac_avg": "value_clipfrac"}
# TRL's name for the policy's ratio is among those of the critic.
RATIO_METRICS = {"val/ratio": "ratio_mean"}
CRITICLESS_TOKEN_METRICS = {"policy/ratio_avg": "ratio_mean"}
KL_LOSS_METRICS = {"loss/kl_avg": "kl_loss"}
# What a pass of the critic's own says.
CRITIC_METRICS = ("loss/value_avg", "val/clipfrac_avg", "grad_norm/critic")
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
        self.has_critic, self.histogram = config.critic.kind != "none", histogram_of(config.critic)
        critic = config.critic
        self.warmup = CriticWarmup(critic.warmup_steps, critic.warmup_explained_var, critic.max_warmup_steps)
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
            advantages = masked_whiten(advantages, of_actions(kept, rollout))
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

    def range_warning(self, returns: Tensor | None) -> str | None:
        """A sentence where returns [N] are beyond what a histogram's bins can say."""
        if self.histogram is None or returns is None or self.histogram.holds(returns):
            return None
        return (
            f"some returns are outside of critic.value_range = [{self.histogram.low:g}, {self.histogram.high:g}], and their values are learned as "
            f"its ends: a range that holds every score, with its KL penalties, would hold them"
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
        """fp32 [N]: the KL penalty at each action, and the score at the last, or what an environment paid at each turn's."""
        reward, logprobs = self.config.reward, evaluation.logprobs
        by_turn = scores.by_action is not None
        rewards = kl_shaped_rewards(
            torch.zeros_like(scores.values) if by_turn else scores.values,
            logprobs,
            logprobs if evaluation.ref_logprobs is None else evaluation.ref_logprobs,
            torch.ones_like(logprobs, dtype=torch.bool),
            coef=self.reward_kl.coef,
            kind=reward.kl_estimator,
            cu_seqlens=rollout.action_cu_seqlens,
        )
        rewards = rewards + scores.by_action if by_turn else rewards
        return masked_whiten(rewards, None, shift_mean=False) if reward.whiten else rewards

    def update(
        self,
        learner: Learner,
        rollout: Rollout,
        evaluation: Evaluation,
        targets: Targets,
        plan: Plan,
        progress: Callable[[int, int], None] | None = None,
        critic_plan: Plan | None = None,
    ) -> dict[str, float]:
        """An optimizer step for each minibatch of the plan; in the critic's warm-up the policy's weights stay as they are. With a plan of the
        critic's own that is for it alone, after the policy's."""
        records = rollout, evaluation, targets
        train_policy = self._policy_learns(learner.step, evaluation, targets)
        if critic_plan is None:
            metrics = self._minimise(learner, *records, plan, progress, train_policy=train_policy)
        else:
            metrics = {}
            if train_policy:
                metrics = self._minimise(learner, *records, plan, progress, train_critic=False)
            metrics |= self._train_critic(learner, *records, critic_plan, progress, metrics)
        return metrics | self._move_coefficients(rollout, evaluation, metrics, train_policy)

    def _policy_learns(self, step: int, evaluation: Evaluation, targets: Targets) -> bool:
        if self.warmup.target is not None and not self.warmup.over:
            self.warmup.update(step, explained_variance(evaluation.values, targets.returns))
        return not self.warmup.holds(step)

    def _train_critic(
        self,
        learner: Learner,
        rollout: Rollout,
        evaluation: Evaluation,
        targets: Targets,
        plan: Plan,
        progress: Callable[[int, int], None] | None,
        metrics: Mapping[str, float],
    ) -> dict[str, float]:
        """The critic alone over a plan; what it says, beside the `metrics` of the policy's update."""
        found = self._minimise(learner, rollout, evaluation, targets, plan, progress, train_policy=False)
        said = {name: found[name] for name in CRITIC_METRICS if name in found}
        return said | {"update/skipped": metrics.get("update/skipped", 0.0) + found["update/skipped"]}

    def _minimise(
        self,
        learner: Learner,
        rollout: Rollout,
        evaluation: Evaluation,
        targets: Targets,
        plan: Plan,
        progress: Callable[[int, int], None] | None,
        *,
        train_policy: bool = True,
        train_critic: bool = True,
    ) -> dict[str, float]:
        learns = {"train_policy": train_policy, "train_critic": train_critic}

        def losses(roles: Roles, minibatch: Minibatch, own: list[Microbatch]) -> Losses:
            return self.losses(roles, rollout, evaluation, targets, minibatch, own, **learns)

        learned = [name for name in learner.optimizers if learns[f"train_{name}"]]
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
        return {
            "reward_kl": self.reward_kl,
            "loss_kl": self.loss_kl,
            "entropy": self.entropy,
            "critic_warmup": self.warmup,
        }

    def losses(
        self,
        roles: Roles,
        rollout: Rollout,
        evaluation: Evaluation,
        targets: Targets,
        minibatch: Minibatch,
        own: list[Microbatch] | None = None,
        *,
        train_policy: bool = True,
        train_critic: bool = True,
    ) -> Losses:
        """(loss, metrics) of each micro-batch, or of those in `own`: both add up to the minibatch's, however it is split.

        Every micro-batch's loss is divided by the denominator of the whole minibatch.
        """
        denominators = self._denominators(rollout, targets, [index for indices in minibatch for index in indices])
        for indices in minibatch if own is None else own:
            batch = rollout.select(indices), evaluation.select(indices), targets.select(indices)
            learns = {"train_policy": train_policy, "train_critic": train_critic}
            yield self.loss(roles, *batch, denominators=denominators, **learns)

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
        train_critic: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) of one packed micro-batch; only its N actions reach the head and the loss."""
        config, loss = self.config, self.config.loss
        has_values = self.has_critic and train_critic
        outputs = roles(rollout, policy=train_policy, values=has_values)
        kept = of_actions(targets.kept, rollout)
        logprobs, advantages = outputs.logprobs if train_policy else evaluation.logprobs, targets.advantages
        if loss.objective == "dis":
            trusted = within_bounds(logprobs, evaluation.logprobs, loss.clip_low, loss.clip_high)
            advantages = torch.where(trusted, advantages, 0)
        numbers = has_values and self.histogram is None
        total, stats = ppo_loss(
            logprobs,
            evaluation.logprobs,
            advantages,
            kept,
            values=outputs.values if numbers else None,
            old_values=evaluation.values if numbers else None,
            returns=targets.returns if numbers else None,
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
            objective="clip"
            if loss.objective == "dis"
            else loss.objective,  # within the bounds their gradients are one
            rollout_correction=loss.rollout_correction,
            rollout_bounds=loss.rollout_bounds,
            aggregation=loss.aggregation,
            denominator=denominators.loss,
        )
        loss_metrics, token_metrics = self._metric_fields(numbers)
        metrics = {name: getattr(stats, field) for name, field in loss_metrics.items()}
        share = stats.tokens / denominators.tokens
        metrics |= {name: getattr(stats, field) * share for name, field in token_metrics.items()}
        if loss.objective == "dis":
            dropped = ~trusted if kept is None else kept & ~trusted
            metrics["policy/clipfrac_avg"] = dropped.sum() / denominators.tokens
        if has_values and not numbers:
            value_loss = self._histogram_loss(roles, outputs.value_logits, rollout, targets, kept, denominators)
            total, metrics["loss/value_avg"] = total + config.critic.vf_coef * value_loss, value_loss.detach()
        if targets.positive is not None and train_policy:
            positive = of_actions(targets.positive, rollout)
            positive = positive if kept is None else positive & kept
            nll = -torch.where(positive, outputs.logprobs, 0).sum() / denominators.positive_tokens
            total, metrics["loss/positive_nll_avg"] = total + loss.positive_nll_coef * nll, nll.detach()
        return total, metrics

    def _histogram_loss(
        self,
        roles: Roles,
        logits: Tensor,
        rollout: Rollout,
        targets: Targets,
        kept: Tensor | None,
        denominators: Denominators,
    ) -> Tensor:
        """0-d: the cross-entropy of the values' histograms with the returns', added up as the loss is."""
        head = roles.value_head if roles.critic is None else roles.critic.head
        mask = torch.ones_like(targets.returns, dtype=torch.bool) if kept is None else kept
        aggregation, bounds = self.config.loss.aggregation, rollout.action_cu_seqlens
        batch = Aggregation(mask, bounds, logits.dtype, aggregation, denominators.loss)
        return batch.loss(head.cross_entropy(logits, targets.returns))

    def _metric_fields(self, numbers: bool) -> tuple[dict[str, str], dict[str, str]]:
        """Metric name -> field of the loss op's statistics, of (losses, means over tokens). numbers: the op has seen values."""
        losses = LOSS_METRICS | (CRITIC_LOSS_METRICS if numbers else {})
        losses |= KL_LOSS_METRICS if self.config.loss.kl_coef > 0 else {}
        tokens = TOKEN_METRICS | (RATIO_METRICS if self.has_critic else CRITICLESS_TOKEN_METRICS)
        tokens |= CRITIC_TOKEN_METRICS if numbers else {}
        return losses, tokens | (CORRECTION_METRICS if self.config.loss.rollout_correction else {})


def within_bounds(logprobs: Tensor, old_logprobs: Tensor, low: float, high: float) -> Tensor:
    """bool [N]: 1 - low < r < 1 + high with r = exp(logprob - old_logprob), where direct double-sided importance sampling lets a token be learned
    from (SAO, arXiv:2607.07508, section 3.1); the loss is -sg[r] A logprob there, and 0 elsewhere."""
    ratio = (logprobs.detach() - old_logprobs).exp()
    return (ratio > 1 - low) & (ratio < 1 + high)


def of_actions(of_sequences: Tensor | None, rollout: Rollout) -> Tensor | None:
    """[B] -> [N]: what holds of a sequence, of each of its actions."""
    if of_sequences is None:
        return None
    return of_sequences.repeat_interleave(rollout.action_cu_seqlens.diff(), output_size=rollout.num_actions)
