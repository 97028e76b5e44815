"""Expert iteration: which answers are imitated, and the gradients of policy and critic."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fastppo.algorithms.expert_iteration import ExpertIteration
from fastppo.learner import accumulate_gradients
from fastppo.model import Histogram
from tests.tiny import make_tokenizer, ppo_config
from tests.tolerance import assert_as_exact_as_native, assert_rounds_to
from tests.trainer.test_ppo import gradients, make_learner, make_roles, make_rollout, make_step, with_holes

EXPERT = {"algorithm": "expert_iteration", "rollout__samples_per_prompt": 2, "reward__solved_score": 0.4}
PUT_TOGETHER = EXPERT | {"search__kind": "value-guided"}


def algorithm(config) -> ExpertIteration:
    return ExpertIteration(config, make_tokenizer())


def imitated(config, rollout, scores, evaluation) -> list[int]:
    return algorithm(config).credit(rollout, evaluation, scores).positive.nonzero().squeeze(1).tolist()


def ready(config, kind="separate", histogram=None, holes=False):
    """(roles, a step of two samples of each of six prompts with scores from -1 to 2, credited by expert iteration)"""
    roles = make_roles(kind, histogram=histogram)
    rollout = make_rollout(roles)
    step = make_step(roles, ppo_config(critic__kind=kind), with_holes(rollout) if holes else rollout)
    targets = algorithm(config).credit(step.rollout, step.evaluation, step.scores)
    return roles, step._replace(targets=targets)


def test_the_best_sample_of_each_prompt_is_imitated_where_it_is_good():
    """Of equal ones the first; scores are above 0.4 from the seventh sequence on."""
    config = ppo_config(**EXPERT)
    _, step = ready(config)
    assert step.targets.positive.nonzero().squeeze(1).tolist() == [7, 9, 11] and step.targets.advantages is None
    equal = dataclasses.replace(step.scores, values=torch.full((12,), 0.4))
    assert imitated(config, step.rollout, equal, step.evaluation) == [0, 2, 4, 6, 8, 10]


def test_the_majoritys_answer_is_imitated_where_it_is_good():
    """The first that says what most say, and nothing of a prompt whose samples say nothing."""
    config = ppo_config(**EXPERT | {"search__kind": "majority", "search__answer": "[a-d]$"})
    _, step = ready(config)
    # Five samples of one prompt, four of another, three of a third; their last letters are what they say.
    tokens, letters = step.rollout.tokens.clone(), make_tokenizer().get_vocab()
    tokens[step.rollout.cu_seqlens[1:].long() - 1] = torch.tensor([letters[letter] for letter in "abbcadcdcefg"])
    prompts = torch.tensor([0] * 5 + [1] * 4 + [2] * 3)
    rollout = dataclasses.replace(step.rollout, tokens=tokens, prompt_index=prompts)
    for score, expected in ((1.0, [0, 5]), (0.0, [])):
        scores = dataclasses.replace(step.scores, values=torch.full((12,), score))
        assert imitated(config, rollout, scores, step.evaluation) == expected


def test_what_a_search_put_together_is_imitated_and_no_sample():
    config = ppo_config(**PUT_TOGETHER)
    _, step = ready(config)
    assert not step.targets.positive.any(), "nothing was put together, as in the critic's warm-up"
    found = torch.arange(12) % 4 == 0
    rollout = dataclasses.replace(step.rollout, found=found)
    assert imitated(config, rollout, step.scores, step.evaluation) == [8]


def test_the_critic_learns_the_returns_of_all_completions():
    """With gamma and lambda of 1 the score, at each of their actions."""
    _, step = ready(ppo_config(**EXPERT, advantage__gae_lambda=1.0))
    counts = torch.tensor(step.rollout.action_counts)
    assert_rounds_to(step.targets.returns, step.scores.values.repeat_interleave(counts).double())


@pytest.mark.parametrize("split", [[list(range(12))], [[i] for i in range(12)]])
@pytest.mark.parametrize("kind, head", [("separate", "scalar"), ("shared", "scalar"), ("separate", "two-hot")])
@pytest.mark.parametrize("holes", [False, True])
def test_the_gradients_are_those_of_cross_entropy_and_value_loss(split, kind, head, holes):
    """However they are split; a token that somebody else wrote counts for nothing."""
    histogram = None if head == "scalar" else Histogram(head, 11, -2.0, 3.0)
    settings = {} if histogram is None else {"critic__head": head, "critic__bins": 11, "critic__value_range": [-2, 3]}
    config = ppo_config(**EXPERT, critic__kind=kind, critic__value_clip=None, critic__vf_coef=0.3, **settings)
    roles, step = ready(config, kind, histogram, holes)
    records = step.rollout, step.evaluation, step.targets
    totals = accumulate_gradients(algorithm(config).losses(roles, *records, split))
    found = gradients(roles)

    good = step.targets.positive.nonzero().squeeze(1).tolist()
    nll = -roles(step.rollout.select(good), values=False).logprobs.mean()
    said = roles(step.rollout)
    if histogram is None:
        value_loss = 0.5 * (said.values - step.targets.returns).square().mean()
    else:
        value_loss = roles.critic.head.cross_entropy(said.value_logits, step.targets.returns).mean()
    (nll + 0.3 * value_loss).backward()
    expected = gradients(roles)
    assert found.keys() == expected.keys() and any("lm_head" in name or "embed" in name for name in found)
    for name, gradient in expected.items():
        assert_as_exact_as_native(found[name].float(), gradient.float(), gradient.double(), name)
    assert_rounds_to(totals["loss/policy_avg"].float(), nll.item())
    assert_rounds_to(totals["loss/value_avg"].float(), value_loss.item())


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_an_update_makes_what_is_imitated_likelier_and_touches_no_policy_without(kind):
    config = ppo_config(**EXPERT, critic__kind=kind, optimizer__lr=1e-3, learner__num_minibatches=2)
    roles, step = ready(config, kind)
    expert, learner = algorithm(config), make_learner(roles, config)
    good = step.targets.positive.nonzero().squeeze(1).tolist()

    def logprob() -> float:
        with torch.no_grad():
            return roles(step.rollout.select(good), values=False).logprobs.mean().item()

    before = logprob()
    metrics = expert.update(learner, step.rollout, step.evaluation, step.targets, step.plan)
    assert logprob() > before + 1e-3 and metrics["update/skipped"] == 0 and metrics["loss/policy_avg"] > 0
    weights = {name: value.clone() for name, value in roles.policy.state_dict().items()}
    nothing = dataclasses.replace(step.targets, positive=torch.zeros(12, dtype=torch.bool))
    if kind == "separate":
        metrics = expert.update(learner, step.rollout, step.evaluation, nothing, step.plan)
        assert all(torch.equal(value, weights[name]) for name, value in roles.policy.state_dict().items())
        assert "loss/policy_avg" not in metrics and math.isfinite(metrics["loss/value_avg"])
