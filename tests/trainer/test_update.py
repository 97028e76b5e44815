"""PPO's invariants: alignment, ratio 1 on the first minibatch, gradients that no split and no padding changes."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fastppo.actor_critic import ActorCritic
from fastppo.config import PPOConfig
from fastppo.experience import compute_advantages, evaluate_networks
from fastppo.minibatch import plan_epochs
from fastppo.model import prepare_model
from fastppo.optimizer import Optimizer
from fastppo.rollout import Engine, Rollout, SamplingParams
from fastppo.update import accumulate_gradients, action_cu_seqlens, update
from tests.tiny import make_model

PROMPTS = [[2, 3], [4, 5, 6, 7, 8], [9], [10, 11, 12], [2], [3, 3, 3]]


def make_networks(critic: str, with_reference: bool = False, dtype=torch.float64) -> ActorCritic:
    model = prepare_model(make_model().to(dtype))
    networks = ActorCritic(model, shared_trunk=critic == "shared", with_reference=with_reference)
    with torch.no_grad():  # a zero head would hide every error of the values
        for name, parameter in networks.critic_parameters():
            if "head" in name or critic == "shared":
                parameter.normal_(generator=torch.Generator().manual_seed(7))
    return networks


def make_rollout(networks: ActorCritic, config: PPOConfig, temperature: float = 1.0) -> tuple[Rollout, list]:
    sampling = SamplingParams(n=2, temperature=temperature, max_new_tokens=9, seed=3)
    rollout = Engine(networks.policy).generate(PROMPTS, sampling)
    rollout.scores = torch.linspace(-1, 2, rollout.num_sequences)
    plan = plan_epochs(
        rollout.lengths,
        epochs=config.ppo_epochs,
        num_minibatches=config.num_minibatches,
        max_tokens=config.tokens_per_microbatch,
        seed=0,
    )
    final_values = evaluate_networks(networks, rollout, [indices for minibatch in plan[0] for indices in minibatch])
    compute_advantages(rollout, final_values, config)
    return rollout, plan


def gradients(networks: ActorCritic) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in networks.named_parameters() if p.grad is not None}
    networks.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ratio_is_exactly_one_on_the_first_minibatch(critic, temperature):
    """The rollout's log-probabilities, recomputed, are the update's, bit for bit: ratio 1, clip fraction 0, KL 0."""
    config = PPOConfig(num_minibatches=3, tokens_per_microbatch=40)
    networks = make_networks(critic, dtype=torch.float32)
    rollout, plan = make_rollout(networks, config, temperature)
    metrics = accumulate_gradients(networks, rollout, plan[0][0], config)
    assert metrics["val/ratio"] == pytest.approx(1.0, abs=1e-7)
    assert metrics["policy/approxkl_avg"] == 0
    assert metrics["policy/clipfrac_avg"] == 0


def test_reference_kl_is_zero_before_training():
    networks = make_networks("separate", with_reference=True, dtype=torch.float32)
    rollout, _ = make_rollout(networks, PPOConfig(kl_coef=0.1))
    assert torch.equal(rollout.ref_logprobs, rollout.old_logprobs)
    last = torch.zeros_like(rollout.action_mask)
    last[rollout.cu_seqlens[1:].long() - 1] = True
    assert torch.equal(rollout.rewards[last], rollout.scores)
    assert (rollout.rewards[~last] == 0).all()


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_gradients_do_not_depend_on_the_split(critic, aggregation):
    """One forward over everything, or one per sequence: the same gradients (verl#5625, trl#6024)."""
    config = PPOConfig(loss_aggregation=aggregation, entropy_coef=0.01, dual_clip=3.0)
    networks = make_networks(critic)
    rollout, _ = make_rollout(networks, config)
    with torch.no_grad():  # away from ratio 1, so that clipping matters
        for parameter in networks.policy.parameters():
            parameter.mul_(1.15)
    everything = list(range(rollout.num_sequences))
    splits = [[everything], [[i] for i in everything], [everything[:5], everything[5:6], everything[6:]]]
    results = []
    for split in splits:
        accumulate_gradients(networks, rollout, split, config)
        results.append(gradients(networks))
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for name, gradient in results[0].items():
            assert torch.allclose(other[name], gradient, rtol=1e-6, atol=1e-9 + 1e-6 * gradient.abs().max()), name


def padded_loss(networks: ActorCritic, rollout: Rollout, config: PPOConfig) -> torch.Tensor:
    """PPO as a textbook writes it: right-padded [B, L], log_softmax, gather, masks; the policy under plain SDPA."""
    lengths, width = rollout.lengths, int(rollout.lengths.max())

    def pad(packed):
        rows = packed.split(lengths.tolist())
        return torch.stack([F.pad(row, (0, width - len(row))) for row in rows])

    tokens, mask = pad(rollout.tokens), pad(rollout.action_mask.long()).bool()
    attention = torch.arange(width)[None] < lengths[:, None]
    policy = copy.deepcopy(networks.policy)
    policy.set_attn_implementation("sdpa")
    object.__setattr__(networks, "textbook_policy", policy)
    logits = policy(input_ids=tokens, attention_mask=attention.long()).logits[:, :-1] / rollout.temperature
    logprobs = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    mask, old, advantages = mask[:, 1:], pad(rollout.old_logprobs)[:, 1:], pad(rollout.advantages)[:, 1:]
    ratio = torch.exp(logprobs - old)
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    return (loss * mask).sum() / mask.sum()


def test_packed_gradients_equal_padded_ones():
    config = PPOConfig(vf_coef=0.0)
    networks = make_networks("separate")
    rollout, _ = make_rollout(networks, config, temperature=0.8)
    with torch.no_grad():
        for parameter in networks.policy.parameters():
            parameter.mul_(1.1)
    padded_loss(networks, rollout, config).backward()
    expected = {name: p.grad for name, p in networks.textbook_policy.named_parameters()}
    accumulate_gradients(networks, rollout, [list(range(rollout.num_sequences))], config)
    for name, parameter in networks.policy.named_parameters():
        scale = expected[name].abs().max()
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-5, atol=1e-5 * scale), name


def test_values_are_those_before_each_token():
    """V_t comes from the hidden state of token t - 1: changing token t changes only later values (verl#1758)."""
    networks = make_networks("separate")
    rollout, _ = make_rollout(networks, PPOConfig())
    changed = dataclasses.replace(rollout, tokens=rollout.tokens.clone())
    start, end = rollout.cu_seqlens[2:4].tolist()
    place = int(rollout.action_mask[start:end].nonzero()[1]) + start
    changed.tokens[place] = (changed.tokens[place] + 1) % 10 + 2
    before = networks(rollout, policy=False).values
    after = networks(changed, policy=False).values
    position = int(rollout.action_mask[:place].sum())
    last = int(rollout.action_mask[:end].sum())
    same = before == after
    assert same[: position + 1].all() and same[last:].all()
    assert not same[position + 1 : last].any()


def test_action_boundaries():
    networks = make_networks("separate")
    rollout, _ = make_rollout(networks, PPOConfig())
    assert action_cu_seqlens(rollout).diff().tolist() == rollout.completion_lengths.tolist()


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_critic_warm_up_leaves_the_policy_alone(critic):
    config = PPOConfig(lr=0.1, critic_lr=0.1)
    networks = make_networks(critic, dtype=torch.float32)
    rollout, plan = make_rollout(networks, config)
    optimizers = {
        "policy": Optimizer(networks.policy.named_parameters(), 0.1, config),
        "critic": Optimizer(networks.critic_parameters(), 0.1, config),
    }
    before = copy.deepcopy(networks.state_dict())
    update(networks, optimizers, rollout, plan, config, train_policy=False)
    changed = {name for name, value in networks.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and not any(name.startswith("policy.") for name in changed)


def test_a_poisoned_minibatch_is_skipped_and_counted():
    config = PPOConfig(num_minibatches=2, ppo_epochs=1)
    networks = make_networks("separate", dtype=torch.float32)
    rollout, plan = make_rollout(networks, config)
    poisoned = plan[0][0][0][0]
    rollout.advantages[rollout.cu_seqlens[poisoned + 1] - 1] = torch.nan
    optimizers = {
        "policy": Optimizer(networks.policy.named_parameters(), 1e-3, config),
        "critic": Optimizer(networks.critic_parameters(), 1e-3, config),
    }
    metrics = update(networks, optimizers, rollout, plan, config)
    assert metrics["update/skipped"] == 1
    assert all(parameter.isfinite().all() for parameter in networks.parameters())
    assert metrics["loss/policy_avg"] == metrics["loss/policy_avg"], "the averages leave the skipped one out"
