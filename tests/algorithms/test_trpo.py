"""The parts of a trust region step against dense fp64 linear algebra on a tiny model."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastppo.algorithms.trpo import TRPO, PolicyStep, require_float32
from fastppo.algorithms.trust_region import natural_gradient
from fastppo.learner import NonFiniteUpdates
from tests.tiny import make_model, ppo_config
from tests.tolerance import assert_as_exact_as_native, assert_rounds_to
from tests.trainer.test_ppo import make_learner, make_roles, make_rollout, poisoned
from tests.trainer.test_ppo import make_step as make_trained_step


@pytest.fixture(autouse=True)
def norms_in_fp64(monkeypatch):
    """Transformers' norms round an fp64 model's states to fp32, which no difference of fp64 numbers survives."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def make_step(temperature: float = 1.0) -> PolicyStep:
    """In fp64, of 12 sequences in micro-batches of several."""
    roles = make_roles("separate")
    rollout = make_rollout(roles, temperature)
    parameters = [p for p in roles.policy.parameters() if p.requires_grad]
    return PolicyStep(roles, parameters, rollout, [[0, 1, 7], [2], [3, 4, 5, 6], [8, 9, 10, 11]])


def jacobian(step: PolicyStep) -> torch.Tensor:
    """[N, P] of the log-probs, one backward pass for each."""
    logprobs = step.roles(step.rollout, values=False).logprobs
    rows = [torch.autograd.grad(x, step.parameters, retain_graph=True) for x in logprobs]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradient_and_fisher_vector_products(temperature):
    step = make_step(temperature)
    dense, count = jacobian(step), step.rollout.num_actions
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(count, dtype=torch.float64, generator=generator)
    expected = dense.T @ weights / count
    assert_as_exact_as_native(step.gradient(weights).float(), expected.float(), expected, "gradient")
    before = step.theta.clone()
    random = torch.randn(len(before), dtype=torch.float64, generator=generator)
    learns = (dense != 0).any(0)  # the embedding of padding never does
    for v in (torch.where(learns, random, 0), expected, 1e-6 * expected):
        fisher_v = dense.T @ (dense @ v) / count
        assert_as_exact_as_native(step.fisher_vector(v).float(), fisher_v.float(), fisher_v, "F v")
    assert torch.equal(torch.cat([p.detach().reshape(-1) for p in step.parameters]), before), "the weights are θ again"


def test_natural_gradient_solves_the_damped_system():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 20, dtype=torch.float64, generator=generator)
    fisher, gradient = root.T @ root, torch.randn(20, dtype=torch.float64, generator=generator)
    found, curvature = natural_gradient(lambda v: fisher @ v, gradient, iterations=30, damping=0.1)
    expected = torch.linalg.solve(fisher + 0.1 * torch.eye(20, dtype=torch.float64), gradient)
    assert_rounds_to(found.float(), expected)
    assert_rounds_to(torch.tensor(curvature), expected @ fisher @ expected)
    few, curvature = natural_gradient(lambda v: fisher @ v, gradient, iterations=2, damping=0.1)
    assert_rounds_to(torch.tensor(curvature), few @ fisher @ few, "also before it has converged")
    nothing, _ = natural_gradient(lambda v: fisher @ v, torch.zeros_like(gradient), iterations=3, damping=0.1)
    assert (nothing == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_comparison_of_whole_distributions(temperature, monkeypatch):
    """KL(old || new), ratio times advantage and entropy, from Transformers' own logits; the vocabulary a few states at a time."""
    monkeypatch.setattr("fastppo.algorithms.trpo.CHUNK", 100)
    step = make_step(temperature)
    rollout, generator = step.rollout, torch.Generator().manual_seed(0)
    advantages = torch.randn(rollout.num_actions, dtype=torch.float64, generator=generator)
    old_model, old = copy.deepcopy(step.roles.policy), step.distributions()
    step.move_to(0.02 * torch.randn(len(step.theta), dtype=torch.float64, generator=generator))
    found = step.compare(old, advantages)

    def distributions(model):
        model.set_attn_implementation("sdpa")
        logits = [model(input_ids=tokens[None]).logits[0] for tokens in rollout.tokens.split(rollout.lengths)]
        return (torch.cat(logits)[rollout.actions - 1] / rollout.temperature).log_softmax(-1)

    with torch.no_grad():
        p, q = distributions(old_model), distributions(step.roles.policy)
    actions = rollout.tokens[rollout.actions, None]
    ratio = (q - p).gather(-1, actions).squeeze(-1).exp()
    assert found.kl > 1e-4
    assert_rounds_to(torch.tensor(found.kl), (p.exp() * (p - q)).sum(-1).mean())
    assert_rounds_to(torch.tensor(found.surrogate), (ratio * advantages).mean())
    assert_rounds_to(torch.tensor(found.old_entropy), -(p.exp() * p).sum(-1).mean())


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_counted():
    """The policy stays, the critic learns; after `learner.max_skipped_updates` of them in a row the run ends."""
    config = ppo_config(algorithm="trpo", learner__max_skipped_updates=2, critic__lr=0.1)
    roles = make_roles("separate", dtype=torch.float32)
    step, learner, algorithm = make_trained_step(roles, config), make_learner(roles, config), TRPO(config)
    learner.start_step(0)
    before, head = copy.deepcopy(roles.policy.state_dict()), roles.critic.head.weight.clone()
    records = step.rollout, step.evaluation, poisoned(step, [3]), step.plan
    metrics = algorithm.update(learner, *records)
    assert metrics["update/skipped"] == 1 and "policy/kl" not in metrics
    assert all(torch.equal(value, before[name]) for name, value in roles.policy.state_dict().items())
    assert not torch.equal(head, roles.critic.head.weight)
    with pytest.raises(NonFiniteUpdates, match="2 updates in a row"):
        algorithm.update(learner, *records)


def test_rounded_weights_are_refused():
    require_float32(make_model())
    with pytest.raises(ValueError, match="dtype is torch.bfloat16, expected torch.float32 with algorithm trpo"):
        require_float32(make_model().bfloat16())
