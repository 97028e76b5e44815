"""What an environment said stands between actions: nothing is learned of it, and credit passes over it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastppo.algorithms.ppo import PPO
from fastppo.config import PPOConfig
from fastppo.evaluation import Evaluation
from fastppo.learner import accumulate_gradients
from fastppo.model import prepare_model
from fastppo.rewards.scores import Scores
from fastppo.roles import Roles
from fastppo.rollout import FinishReason, Rollout
from fastppo.targets import Targets
from tests.envs.worlds import Talk, make_engine, play
from tests.tiny import make_model, ppo_config
from tests.tolerance import assert_as_exact_as_model, assert_as_exact_as_native


@pytest.fixture(scope="module")
def talked():
    return play(Talk, make_engine())


def turns_alone(rollout: Rollout) -> Rollout:
    """A sequence for each turn, of which all that came before is the prompt."""
    tokens, mask, lengths = [], [], []
    places, bounds = rollout.actions.tolist(), rollout.turn_bounds
    starts = [max(start for start in rollout.bounds if start <= places[first]) for first in bounds[:-1]]
    for start, first, last in zip(starts, bounds, bounds[1:], strict=False):
        begin, end = places[first], places[last - 1] + 1
        tokens += rollout.tokens[start:end].tolist()
        mask += [start + i >= begin for i in range(end - start)]
        lengths.append(end - start)
    count = len(lengths)
    return Rollout(
        tokens=torch.tensor(tokens),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        action_mask=torch.tensor(mask),
        logprobs=rollout.logprobs,
        processed_logprobs=rollout.processed_logprobs,
        finish_reasons=torch.zeros(count, dtype=torch.int8),
        prompt_index=torch.arange(count),
        temperature=rollout.temperature,
    )


def gradients(rollout: Rollout, dtype: torch.dtype) -> Tensor:
    """Of policy and critic, for chance advantages and returns."""
    torch.manual_seed(1)
    model = prepare_model(make_model(max_position_embeddings=256).to(dtype))
    roles = Roles(model, critic="separate")
    for parameter in roles.critic.head.parameters():
        torch.nn.init.normal_(parameter)
    numbers = torch.randn(4, rollout.num_actions, dtype=torch.float64).to(dtype)
    old = rollout.logprobs.to(dtype) + 0.1 * numbers[0]
    evaluation = Evaluation(rollout.action_bounds, logprobs=old, values=numbers[1])
    targets = Targets(rollout.action_bounds, advantages=numbers[2], returns=numbers[3])
    algorithm = PPO(ppo_config(loss__entropy_coef=0.1))
    minibatch = [list(range(rollout.num_sequences))]
    accumulate_gradients(algorithm.losses(roles, rollout, evaluation, targets, minibatch))
    return torch.cat([p.grad.flatten() for module in roles.trained().values() for p in module.parameters()])


def test_gradients_are_those_of_the_turns_alone(talked):
    alone = turns_alone(talked.rollout)
    assert alone.num_sequences == len(talked.rollout.turn_bounds) - 1 > talked.rollout.num_sequences
    assert torch.equal(alone.tokens[alone.actions], talked.rollout.tokens[talked.rollout.actions])
    exact = gradients(alone, torch.float64)
    assert exact.abs().max() > 1e-3
    assert_as_exact_as_model(gradients(talked.rollout, torch.float32), gradients(alone, torch.float32), exact)


def scores_of(talked) -> Scores:
    earned = torch.tensor([episode.total_reward for episode in talked.episodes])
    return Scores(earned, {}).paid_by_turn(talked.turn_rewards(), earned, talked.rollout)


def generalised(rewards: Tensor, values: Tensor, final: Tensor, gamma: float, lam: float) -> Tensor:
    """Advantages of one sequence's actions, by the recursion."""
    found, later, following = [], torch.zeros_like(final), final
    for reward, value in zip(rewards.flip(0), values.flip(0), strict=True):
        later = reward + gamma * following - value + gamma * lam * later
        found.append(later)
        following = value
    return torch.stack(found[::-1])


@pytest.mark.parametrize("bootstrap", [False, True])
def test_credit_goes_from_action_to_action_over_what_was_said_between(talked, bootstrap):
    rollout = talked.rollout.select(range(talked.rollout.num_sequences))
    reason = FinishReason.LENGTH if bootstrap else FinishReason.STOP
    vars(rollout)["finish_reasons"] = torch.full_like(rollout.finish_reasons, reason)
    settings = {"gamma": 0.9, "gae_lambda": 0.7, "whiten": False, "bootstrap_truncated": bootstrap}
    algorithm = PPO(PPOConfig(advantage=settings))
    values, finals = torch.randn(rollout.num_actions), torch.randn(rollout.num_sequences)
    evaluation = Evaluation(rollout.action_bounds, logprobs=rollout.logprobs, values=values, final_values=finals)
    found = algorithm.credit(rollout, evaluation, scores_of(talked)).advantages

    def by_hand(dtype: torch.dtype) -> Tensor:
        numbers = (talked.turn_rewards().to(dtype), values.to(dtype))
        ends = finals.to(dtype) if bootstrap else torch.zeros(len(finals), dtype=dtype)
        sequences = zip(*(x.split(rollout.action_counts) for x in numbers), ends, strict=True)
        return torch.cat([generalised(*sequence, 0.9, 0.7) for sequence in sequences])

    assert_as_exact_as_native(found, by_hand(torch.float32), by_hand(torch.float64))


def test_scores_by_turn_stay_with_their_sequences(talked):
    scores, rollout = scores_of(talked), talked.rollout
    parts = [scores.select([i]) for i in range(rollout.num_sequences)]
    for again in (Scores.joined(parts), scores.select(range(rollout.num_sequences))):
        assert torch.equal(again.by_action, scores.by_action) and list(again.action_bounds) == rollout.action_bounds
    picked = scores.select([3, 0])
    bounds = rollout.action_bounds
    assert torch.equal(picked.by_action, torch.cat([scores.by_action[bounds[i] : bounds[i + 1]] for i in (3, 0)]))


def test_what_is_not_the_environments_is_paid_at_the_end(talked):
    rollout, earned = talked.rollout, torch.tensor([episode.total_reward for episode in talked.episodes])
    more = torch.arange(rollout.num_sequences).float()
    scores = Scores(earned + more, {}).paid_by_turn(talked.turn_rewards(), earned, rollout)
    lasts = torch.tensor(rollout.action_bounds[1:]) - 1
    assert torch.equal(scores.by_action[lasts] - talked.turn_rewards()[lasts], more)
    cut_off = rollout.select(range(rollout.num_sequences))
    vars(cut_off)["finish_reasons"] = torch.full_like(rollout.finish_reasons, FinishReason.LENGTH)
    penalised = scores.penalised(cut_off, 2.0)
    assert torch.equal(penalised.values, scores.values - 2)
    assert torch.equal(penalised.by_action[lasts], scores.by_action[lasts] - 2)
