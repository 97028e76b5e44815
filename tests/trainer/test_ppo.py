"""PPO's invariants: alignment, ratio 1 on the first minibatch, gradients that no split and no padding changes."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from fastppo.algorithms.ppo import PPO
from fastppo.config import PPOConfig
from fastppo.evaluation import Evaluation
from fastppo.learner import Learner, NonFiniteUpdates, accumulate_gradients
from fastppo.model import prepare_model
from fastppo.optimizer import LossScale
from fastppo.plan import Lengths, plan_epochs
from fastppo.rewards.scores import Scores
from fastppo.roles import Roles
from fastppo.rollout import Engine, Rollout, SamplingParams
from fastppo.targets import Targets
from tests.tiny import make_model, ppo_config
from tests.tolerance import assert_as_exact_as_model, assert_as_exact_as_native, assert_rounds_to

PROMPTS = [[2, 3], [4, 5, 6, 7, 8], [9], [10, 11, 12], [2], [3, 3, 3]]


class Step(NamedTuple):
    """A sampled, scored and evaluated batch, ready to be learned from."""

    rollout: Rollout
    scores: Scores
    evaluation: Evaluation
    targets: Targets
    plan: list

    def losses(self, roles: Roles, minibatch: list, config: PPOConfig, **options):
        return PPO(config).losses(roles, self.rollout, self.evaluation, self.targets, minibatch, **options)

    def accumulate(self, roles: Roles, minibatch: list, config: PPOConfig, **options) -> dict[str, float]:
        """The minibatch's metrics; its gradients are added to the parameters."""
        totals = accumulate_gradients(self.losses(roles, minibatch, config, **options))
        return {name: total.item() for name, total in totals.items()}


def make_roles(critic: str, with_reference: bool = False, dtype=torch.float64, histogram=None) -> Roles:
    model = prepare_model(make_model().to(dtype))
    roles = Roles(model, critic=critic, histogram=histogram, with_reference=with_reference)
    with torch.no_grad():  # a zero head would hide every error of the values
        for name, parameter in roles.trained()["critic"].named_parameters():
            if "head" in name or critic == "shared":
                parameter.normal_(generator=torch.Generator().manual_seed(7))
    return roles


def make_learner(roles: Roles, config: PPOConfig) -> Learner:
    return Learner(
        roles, optimizer=config.optimizer, critic=config.critic, config=config.learner, total_steps=config.total_steps
    )


def make_rollout(roles: Roles, temperature: float = 1.0) -> Rollout:
    sampling = SamplingParams(n=2, temperature=temperature, max_new_tokens=9, seed=3)
    return Engine(roles.policy).generate(PROMPTS, sampling)


def make_step(roles: Roles, config: PPOConfig, rollout: Rollout | None = None, temperature: float = 1.0) -> Step:
    rollout = make_rollout(roles, temperature) if rollout is None else rollout
    scores = Scores(torch.linspace(-1, 2, rollout.num_sequences), {})
    sizes = {"num_minibatches": config.learner.num_minibatches, "max_tokens": config.learner.tokens_per_microbatch}
    plan, algorithm = plan_epochs(Lengths.of(rollout), epochs=config.learner.epochs, seed=0, **sizes), PPO(config)
    evaluation = roles.evaluate(rollout, algorithm.needs, plan)
    return Step(rollout, scores, evaluation, algorithm.credit(rollout, evaluation, scores), plan)


def with_holes(rollout: Rollout) -> Rollout:
    """Every third action becomes a token that somebody else wrote, such as a tool's answer."""
    kept = torch.arange(rollout.num_actions) % 3 != 1
    mask = rollout.action_mask.clone()
    mask[rollout.actions[~kept]] = False
    sampled = {name: getattr(rollout, name)[kept] for name in ("logprobs", "processed_logprobs")}
    return dataclasses.replace(rollout, action_mask=mask, **sampled)


def gradients(roles: Roles) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in roles.named_parameters() if p.grad is not None}
    roles.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ratio_is_exactly_one_on_the_first_minibatch(critic, temperature):
    """The rollout's log-probabilities, recomputed, are the update's, bit for bit: ratio 1, clip fraction 0, KL 0."""
    config = ppo_config(learner__num_minibatches=3, learner__tokens_per_microbatch=40)
    roles = make_roles(critic, dtype=torch.float32)
    step = make_step(roles, config, temperature=temperature)
    batches = [indices for indices in step.plan[0][0]]
    for indices in batches:
        logprobs = roles(step.rollout.select(indices), values=False).logprobs
        assert torch.equal(logprobs, step.evaluation.select(indices).logprobs)
    metrics = step.accumulate(roles, batches, config)
    assert metrics["policy/approxkl_avg"] == 0
    assert metrics["policy/clipfrac_avg"] == 0


def test_reference_kl_is_zero_before_training():
    config = ppo_config(reward__kl_coef=0.1)
    roles = make_roles("separate", with_reference=True, dtype=torch.float32)
    rollout, scores, evaluation, *_ = make_step(roles, config)
    assert torch.equal(evaluation.ref_logprobs, evaluation.logprobs)
    rewards = PPO(config).shaped_rewards(rollout, evaluation, scores)
    last = torch.zeros(rollout.num_actions, dtype=torch.bool)
    last[torch.tensor(rollout.action_bounds[1:]) - 1] = True
    assert torch.equal(rewards[last], scores.values)
    assert (rewards[~last] == 0).all()


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_gradients_do_not_depend_on_the_split(critic, aggregation, holes):
    """One forward over everything, or one per sequence: the same gradients (verl#5625, trl#6024)."""
    config = ppo_config(loss__aggregation=aggregation, loss__entropy_coef=0.01, loss__dual_clip=3.0)
    roles = make_roles(critic)
    rollout = make_rollout(roles)
    step = make_step(roles, config, with_holes(rollout) if holes else rollout)
    with torch.no_grad():  # away from ratio 1, so that clipping matters
        for parameter in roles.policy.parameters():
            parameter.mul_(1.15)
    everything = list(range(rollout.num_sequences))
    splits = [[everything], [[i] for i in everything], [everything[:5], everything[5:6], everything[6:]]]
    results = []
    for split in splits:
        step.accumulate(roles, split, config)
        results.append(gradients(roles))
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for name, gradient in results[0].items():
            assert_as_exact_as_native(other[name].float(), gradient.float(), gradient.double(), name)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_holes_are_not_counted(aggregation):
    """Tokens between the actions are no actions: denominators and metrics count those that the policy chose, and no others."""
    config = ppo_config(loss__aggregation=aggregation)
    roles = make_roles("separate")
    rollout = with_holes(make_rollout(roles))
    rollout, _, evaluation, targets, _ = step = make_step(roles, config, rollout)
    minibatch = list(range(rollout.num_sequences))
    metrics = step.accumulate(roles, [minibatch[:4], minibatch[4:]], config)
    assert_rounds_to(torch.tensor(metrics["val/ratio"]), 1.0, "a mean over the actions")

    def aggregated(per_action: torch.Tensor) -> torch.Tensor:
        losses = [x for x in per_action.double().split(rollout.action_counts) if len(x)]
        return {
            "token-mean": sum(map(torch.sum, losses)) / rollout.num_actions,
            "seq-mean-token-sum": sum(map(torch.sum, losses)) / len(losses),
            "seq-mean-token-mean": sum(map(torch.mean, losses)) / len(losses),
        }[aggregation]

    size = aggregated(targets.advantages.abs())  # the loss is a sum that cancels, and is rounded as its parts are
    found = (size + metrics["loss/policy_avg"]).float()
    assert_rounds_to(found, size - aggregated(targets.advantages))
    assert rollout.num_actions == sum(rollout.action_counts) < sum(len(c) for c in rollout.completions())


def padded_loss(policy: torch.nn.Module, step: Step, config: PPOConfig) -> torch.Tensor:
    """PPO as a textbook writes it: right-padded [B, L], log_softmax, gather, masks; the policy under plain SDPA."""
    rollout = step.rollout
    lengths, width = torch.tensor(rollout.lengths), max(rollout.lengths)

    def pad(packed):
        rows = packed.split(rollout.lengths)
        return torch.stack([F.pad(row, (0, width - len(row))) for row in rows])

    def scattered(actions):
        return pad(actions.new_zeros(rollout.num_tokens).index_copy(0, rollout.actions, actions))

    tokens, mask = pad(rollout.tokens), pad(rollout.action_mask.long()).bool()
    attention = torch.arange(width)[None] < lengths[:, None]
    policy.set_attn_implementation("sdpa")
    logits = policy(input_ids=tokens, attention_mask=attention.long()).logits[:, :-1] / rollout.temperature
    logprobs = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    old, advantages = scattered(step.evaluation.logprobs)[:, 1:], scattered(step.targets.advantages)[:, 1:]
    mask, ratio = mask[:, 1:], torch.exp(logprobs - old)
    clipped = ratio.clamp(1 - config.loss.clip_low, 1 + config.loss.clip_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    return (loss * mask).sum() / mask.sum()


@pytest.mark.parametrize("holes", [False, True])
def test_packed_gradients_equal_padded_ones(holes):
    config = ppo_config(critic__vf_coef=0.0)
    roles = make_roles("separate")
    rollout = make_rollout(roles, temperature=0.8)
    step = make_step(roles, config, with_holes(rollout) if holes else rollout)
    with torch.no_grad():
        for parameter in roles.policy.parameters():
            parameter.mul_(1.1)
    textbook = copy.deepcopy(roles.policy)
    padded_loss(textbook, step, config).backward()
    expected = {name: p.grad for name, p in textbook.named_parameters()}
    step.accumulate(roles, [list(range(rollout.num_sequences))], config)
    for name, parameter in roles.policy.named_parameters():
        assert_as_exact_as_native(parameter.grad.float(), expected[name].float(), expected[name], name)


def test_values_are_those_before_each_token():
    """V_t comes from the hidden state of token t - 1: changing token t changes only later values (verl#1758)."""
    roles = make_roles("separate")
    rollout = make_rollout(roles)
    place = int(rollout.actions[rollout.action_bounds[1] + 1])  # the second action of the second sequence
    tokens = rollout.tokens.clone()
    tokens[place] = (tokens[place] + 1) % 10 + 2
    before = roles(rollout, policy=False).values
    after = roles(dataclasses.replace(rollout, tokens=tokens), policy=False).values
    same, first, last = before == after, rollout.action_bounds[1] + 1, rollout.action_bounds[2]
    assert same[: first + 1].all() and same[last:].all()
    assert not same[first + 1 : last].any()


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_critic_warm_up_leaves_the_policy_alone(critic):
    config = ppo_config(optimizer__lr=0.1, critic__lr=0.1, critic__kind=critic, critic__warmup_steps=1)
    roles = make_roles(critic, dtype=torch.float32)
    step, learner = make_step(roles, config), make_learner(roles, config)
    learner.start_step(0)
    before = copy.deepcopy(roles.state_dict())
    PPO(config).update(learner, step.rollout, step.evaluation, step.targets, step.plan)
    changed = {name for name, value in roles.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and not any(name.startswith("policy.") for name in changed)


def test_a_shared_critics_warm_up_runs_no_trunk_backward():
    """Its gradients would be thrown away: in the warm-up the trunk has none."""
    config = ppo_config(critic__kind="shared")
    roles = make_roles("shared", dtype=torch.float32)
    step = make_step(roles, config)
    step.accumulate(roles, step.plan[0][0], config, train_policy=False)
    assert all(parameter.grad is None for parameter in roles.policy.parameters())
    assert all(parameter.grad is not None for parameter in roles.value_head.parameters())


def poisoned(step: Step, sequences: list[int]) -> Targets:
    """Targets whose advantages are NaN at the last action of these sequences."""
    advantages = step.targets.advantages.clone()
    for sequence in sequences:
        advantages[step.rollout.action_bounds[sequence + 1] - 1] = torch.nan
    return dataclasses.replace(step.targets, advantages=advantages)


def test_a_poisoned_minibatch_is_skipped_and_counted():
    config = ppo_config(learner__num_minibatches=2, learner__epochs=1, optimizer__lr=1e-3)
    roles = make_roles("separate", dtype=torch.float32)
    step, learner = make_step(roles, config), make_learner(roles, config)
    targets = poisoned(step, [step.plan[0][0][0][0]])
    metrics = PPO(config).update(learner, step.rollout, step.evaluation, targets, step.plan)
    assert metrics["update/skipped"] == 1
    assert all(parameter.isfinite().all() for parameter in roles.parameters())
    assert all(map(math.isfinite, metrics.values())), "the averages leave the skipped one out"


def test_non_finite_updates_in_a_row_stop_the_run_although_one_in_eight_succeeds():
    """They are counted one after another, over the borders of steps, and a finite one starts the count again."""
    config = ppo_config(learner__num_minibatches=8, learner__epochs=1, learner__max_skipped_updates=7)
    roles = make_roles("separate", dtype=torch.float32)
    step, learner = make_step(roles, config), make_learner(roles, config)
    groups = [[i for indices in minibatch for i in indices] for minibatch in step.plan[0]]
    bad = poisoned(step, [i for group in groups[:1] + groups[2:] for i in group])

    def update(targets: Targets) -> dict[str, float]:
        return PPO(config).update(learner, step.rollout, step.evaluation, targets, step.plan)

    assert update(bad)["update/skipped"] == 7
    assert learner.skipped_in_a_row == 6
    with pytest.raises(NonFiniteUpdates, match="7 updates in a row"):
        update(bad)


def test_metrics_do_not_depend_on_the_default_type():
    config = ppo_config()
    roles = make_roles("separate", dtype=torch.float32)
    step = make_step(roles, config)
    expected = step.accumulate(roles, step.plan[0][0], config)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert step.accumulate(roles, step.plan[0][0], config) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_gradient_checkpointing_changes_no_bit_and_recomputes():
    """A model that was loaded in evaluation mode checkpoints too: Transformers does it in training mode only."""
    config, found, calls = ppo_config(), [], []
    for checkpointing in (False, True):
        model = prepare_model(make_model().eval())
        seen = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        roles = Roles(model, critic="shared", gradient_checkpointing=checkpointing)
        step = make_step(roles, config)
        seen.clear()
        step.accumulate(roles, step.plan[0][0][:1], config)
        found.append(gradients(roles))
        calls.append(len(seen))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert calls == [1, 2]


HALF_CONFIG = ppo_config(optimizer__lr=1e-3, learner__epochs=1, learner__num_minibatches=1)


def half_step(critic: str) -> tuple[Roles, Step]:
    roles = make_roles(critic, dtype=torch.float16)
    return roles, make_step(roles, HALF_CONFIG)


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_fp16_gradients_are_those_of_the_loss(critic):
    """Of masters, and of the value head, which is fp32 beside an fp16 trunk: the loss scale is gone from both before the norm."""
    roles, step = half_step(critic)
    plain, exact = copy.deepcopy(roles), copy.deepcopy(roles).double()
    learner = make_learner(roles, HALF_CONFIG)
    assert learner.loss_scale.value > 1
    metrics, norms, finite = learner._gradients(
        lambda roles, minibatch, own: step.losses(roles, minibatch, HALF_CONFIG), step.plan[0][0]
    )
    for other in (plain, exact):
        step.accumulate(other, step.plan[0][0], HALF_CONFIG)
    natives, exacts = (dict(other.named_parameters()) for other in (plain, exact))
    paths = {id(p): name for name, p in roles.named_parameters()}
    for optimizer in learner.optimizers.values():
        for name, parameter in optimizer.parameters.items():
            path = paths[id(parameter)]
            ours = optimizer.masters[name].grad.half()
            assert_as_exact_as_model(ours, natives[path].grad, exacts[path].grad, path)
    assert finite and metrics["grad_norm/critic"] == norms["critic"].item() > 0


def test_fp16_trains_as_fp32_does():
    """The metrics of an update from the same weights on the same batch: no farther from fp32's than half-precision rounding takes them."""
    roles, step = half_step("separate")
    found, losses = (
        [],
        {"loss/policy_avg", "loss/value_avg", "policy/entropy_avg", "grad_norm/policy", "grad_norm/critic"},
    )
    for dtype in (torch.float16, torch.float32, torch.float64):
        own = copy.deepcopy(roles)
        own = own if dtype == torch.float16 else own.to(dtype)  # whose value head is fp32
        metrics = PPO(HALF_CONFIG).update(
            make_learner(own, HALF_CONFIG), step.rollout, step.evaluation, step.targets, step.plan
        )
        assert metrics["update/skipped"] == 0
        found.append(torch.tensor([metrics[name] for name in sorted(losses)], dtype=torch.float64))
        assert not torch.equal(own.policy.lm_head.weight, roles.policy.lm_head.weight.to(dtype))
    assert_as_exact_as_native(found[0].half(), found[1], found[2])


def test_an_overflow_lowers_the_scale_and_repeats_the_minibatch():
    """It ends where it would have ended with the lower scale from the start, bit for bit, and skips nothing."""
    roles, step = half_step("separate")
    loud = dataclasses.replace(step.targets, advantages=step.targets.advantages * 3e3)
    scale, weights = None, []
    for _ in range(2):
        own = copy.deepcopy(roles)
        learner = make_learner(own, HALF_CONFIG)
        if scale is not None:
            learner.loss_scale.value = scale
        metrics = PPO(HALF_CONFIG).update(learner, step.rollout, step.evaluation, loud, step.plan)
        assert metrics["update/skipped"] == 0 and math.isfinite(metrics["grad_norm/policy"])
        assert 1 < learner.loss_scale.value < LossScale.LARGEST
        scale = learner.loss_scale.value
        weights.append(list(own.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_nan_in_fp16_is_skipped_and_leaves_the_scale():
    roles, step = half_step("separate")
    learner = make_learner(roles, HALF_CONFIG)
    before = copy.deepcopy(list(roles.parameters()))
    metrics = PPO(HALF_CONFIG).update(learner, step.rollout, step.evaluation, poisoned(step, [0]), step.plan)
    assert metrics == {"update/skipped": 1}
    assert learner.loss_scale.value == LossScale.LARGEST
    assert all(torch.equal(a, b) for a, b in zip(roles.parameters(), before, strict=True))
