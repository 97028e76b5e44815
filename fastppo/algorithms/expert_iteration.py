"""Expert iteration (Anthony et al. 2017, arXiv:1705.08439): a search finds answers, and policy and critic learn from those that turn out right.

Where the search is a choice among samples by their score, it is STaR's and ReST-EM's self-training (Zelikman et al. 2022, arXiv:2203.14465; Singh
et al. 2023, arXiv:2312.06585).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastppo.algorithms.ppo import PPO, Denominators, of_actions
from fastppo.config import PPOConfig
from fastppo.evaluation import Evaluation
from fastppo.learner import Learner
from fastppo.model.decoding import decode
from fastppo.ops import ppo_loss
from fastppo.plan import Lengths, Plan, split_again
from fastppo.rewards.scores import Scores
from fastppo.roles import Outputs, Roles
from fastppo.rollout.record import on_device
from fastppo.rollout.rollout import Rollout
from fastppo.search.answers import last_match, votes_for
from fastppo.targets import Targets


class ExpertIteration(PPO):
    """The policy's loss is the cross-entropy with one good answer to each prompt, and nothing where there is none; the critic learns the returns of
    all completions, as PPO's does."""

    def __init__(self, config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """tokenizer: reads what completions say, for a majority."""
        super().__init__(config)
        self._tokenizer = tokenizer

    def credit(self, rollout: Rollout, evaluation: Evaluation, scores: Scores) -> Targets:
        """`positive` are the answers to imitate: of each prompt what its search has come to, where that has `reward.solved_score` at least."""
        returns = None
        if self.has_critic:
            rewards = self.shaped_rewards(rollout, evaluation, scores)
            _, returns = self._estimate(rewards, rollout, evaluation, scores)
        values = scores.values.tolist()
        good = [i for i in self._found(rollout, values) if values[i] >= self.config.reward.solved_score]
        positive = torch.zeros_like(scores.values, dtype=torch.bool)
        positive[on_device(good, positive.device)] = True
        return Targets(rollout.action_bounds, returns=returns, positive=positive)

    def _found(self, rollout: Rollout, scores: list[float]) -> list[int]:
        """The sequence that the search has come to, of each prompt for which there is one; of equal ones the first."""
        if rollout.found is not None:
            return rollout.found.nonzero().squeeze(1).tolist()
        members: dict[int, list[int]] = {}
        for i, prompt in enumerate(rollout.prompt_index.tolist()):
            members.setdefault(prompt, []).append(i)
        kind = self.config.search.kind
        if kind == "best-of-n":
            return [max(own, key=scores.__getitem__) for own in members.values()]
        return self._most_voted(rollout, members) if kind == "majority" else []

    def _most_voted(self, rollout: Rollout, members: dict[int, list[int]]) -> list[int]:
        says, completions = last_match(self.config.search.answer), rollout.completions()
        chosen = []
        for own in members.values():
            said = [says(decode(self._tokenizer, completions[i], skip_special_tokens=True)) for i in own]
            votes, i = max(zip(votes_for(said), own, strict=True), key=lambda vote: vote[0])
            chosen += [i] if votes else []
        return chosen

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
        """The policy over the answers to imitate, then the critic over all completions; where they share a trunk, both at once."""
        records, metrics = (rollout, evaluation, targets), {"update/skipped": 0.0}
        train_policy = self._policy_learns(learner.step, evaluation, targets)
        if learner.roles.value_head is not None:
            return self._minimise(learner, *records, plan, progress, train_policy=train_policy)
        imitated = self._part(plan, targets.positive.tolist(), rollout, learner)
        if train_policy and imitated[0]:
            metrics = self._minimise(learner, *records, imitated, progress, train_critic=False)
        if self.has_critic:
            metrics |= self._train_critic(learner, *records, critic_plan or plan, progress, metrics)
        return metrics

    def _part(self, plan: Plan, chosen: list[bool], rollout: Rollout, learner: Learner) -> Plan:
        """The plan without the sequences that are not chosen."""
        part = [[[[i for i in indices if chosen[i]] for indices in minibatch] for minibatch in epoch] for epoch in plan]
        part = [[minibatch for minibatch in epoch if any(minibatch)] for epoch in part]
        return split_again(part, Lengths.of(rollout), learner.budget.tokens, learner.ranks.size)

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
        """(loss, metrics) of one packed micro-batch: the mean over the tokens to imitate of -log-prob, and the mean over all tokens of the value
        loss."""
        has_values = self.has_critic and train_critic
        outputs = roles(rollout, policy=train_policy, values=has_values)
        loss, metrics = 0.0, {}
        if train_policy:
            imitated = of_actions(targets.positive, rollout)
            means = {"loss/policy_avg": -outputs.logprobs, "policy/entropy_avg": outputs.entropy}
            means = {
                name: torch.where(imitated, x, 0).sum() / denominators.positive_tokens for name, x in means.items()
            }
            loss, metrics = means["loss/policy_avg"], {name: mean.detach() for name, mean in means.items()}
        if has_values:
            value_loss, said = self._value_loss(roles, outputs, rollout, evaluation, targets, denominators)
            loss, metrics = loss + self.config.critic.vf_coef * value_loss, metrics | said
        return loss, metrics

    def _value_loss(
        self,
        roles: Roles,
        outputs: Outputs,
        rollout: Rollout,
        evaluation: Evaluation,
        targets: Targets,
        denominators: Denominators,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.histogram is not None:
            logits = outputs.value_logits
            loss = self._histogram_loss(roles, logits, rollout, targets, None, denominators)
            return loss, {"loss/value_avg": loss.detach()}
        old = evaluation.values
        nothing = torch.zeros_like(old)  # in place of the policy
        loss, stats = ppo_loss(
            nothing,
            nothing,
            nothing,
            values=outputs.values,
            old_values=old,
            returns=targets.returns,
            value_clip=self.config.critic.value_clip,
            vf_coef=1.0,
            denominator=denominators.loss,
        )
        share = stats.tokens / denominators.tokens
        return loss, {"loss/value_avg": stats.value_loss, "val/clipfrac_avg": stats.value_clipfrac * share}
