"""A run of several ranks is the run that one process would make: the same completions, gradients and metrics up to the order of sums."""

from __future__ import annotations

import traceback
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastppo.collection import Collector
from fastppo.optimizer import Optimizer
from fastppo.rewards import WeightedReward
from fastppo.run_folder import read_metrics
from tests.distributed.ranks import run_ranks
from tests.tiny_trainer import PROMPTS, build_trainer, count_a
from tests.tolerance import assert_same_on_ranks

STEPS = 200
GROUPS = {"rollout__samples_per_prompt": 4, "rollout__prompts_per_step": 3}
EXPERT = {"algorithm": "expert_iteration", "reward__solved_score": 0.01} | GROUPS
# What a step is made of, each in another way: how micro-batches are cut, the estimator and the loss, who the critic is.
KINDS = {
    "ppo": {},
    "micro_batches": {"learner__tokens_per_microbatch": 20, "learner__epochs": 2},
    "uneven": {"rollout__prompts_per_step": 5, "rollout__samples_per_prompt": 3, "learner__num_minibatches": 3},
    "one_prompt": {"rollout__prompts_per_step": 1, "rollout__samples_per_prompt": 2},
    "reference": {"reward__kl_coef": 0.1, "loss__kl_coef": 0.1, "reward__kl_target": 0.5, "advantage__whiten": True},
    "shared": {"critic__kind": "shared"},
    "histogram": {"critic__head": "hl-gauss", "critic__bins": 11, "critic__value_range": (-1.0, 2.0)},
    "critic_epochs": {"critic__epochs": 3, "critic__tokens_per_microbatch": 30},
    "lora": {"lora__r": 2, "reward__kl_coef": 0.1},
    "grpo": {"advantage__estimator": "grpo", "loss__aggregation": "seq-mean-token-mean"} | GROUPS,
    "masked": {"loss__mask_truncated_completions": True, "loss__positive_nll_coef": 0.1},
    "remax": {"advantage__estimator": "remax"},
    "dynamic_sampling": {"rollout__dynamic_sampling": True} | GROUPS,
    "trpo": {"algorithm": "trpo"},
    "majority": EXPERT | {"search__kind": "majority", "search__answer": "a|b"},
    "value_guided": EXPERT | {"search__kind": "value-guided", "search__width": 3},
    "puct": EXPERT | {"search__kind": "puct", "search__step": "b", "search__step_tokens": 2, "search__simulations": 3},
    "staleness": {"rollout__staleness": 1, "optimizer__lr": 1e-2, "total_steps": 3},
    "staleness_vtrace": {"rollout__staleness": 1, "advantage__estimator": "vtrace", "rollout__prompts_per_step": 3},
}
# Of four ranks those where some have nothing, or less than others; the rest is slow.
FEW = {kind: KINDS[kind] for kind in ("micro_batches", "uneven", "one_prompt", "shared")}
OTHERS = {kind: changes for kind, changes in KINDS.items() if kind not in FEW}
TOGETHER = {1: [KINDS], 2: [KINDS], 4: [FEW, OTHERS]}
SEVERAL = [(2, kind) for kind in KINDS] + [(4, kind) for kind in FEW]
SEVERAL += [pytest.param(4, kind, marks=pytest.mark.slow) for kind in OTHERS]
OF_THE_MACHINE = ("time/", "perf/", "distributed/", "rollout/occupancy", "rollout/shared_prompt_share")


def letters(prompts, completions, **_):
    """Of some completions alone."""
    return [None if text.startswith("a") else float(len(set(text))) for text in completions]


REWARDS = [count_a, WeightedReward(letters, weight=0.1, normalise=True)]


class Run(NamedTuple):
    completions: list
    """Of each sampling."""
    gradients: list[Tensor]
    """Of each optimizer step, all of them flat."""
    metrics: dict[str, float]
    weights: dict[str, Tensor]


def train(folder: str, kinds: dict) -> dict[str, Run | str]:
    """Each kind's run, or what it raised."""
    found = {}
    for kind, changes in kinds.items():
        try:
            found[kind] = _train(f"{folder}/{kind}", changes)
        except Exception:
            found[kind] = traceback.format_exc()
    return found


def _train(folder: str, changes: dict) -> Run:
    trainer = build_trainer(folder, reward=REWARDS, eval_prompts=PROMPTS[:3], **changes)
    completions, gradients = [], []

    class NotingCollector(Collector):
        def gather(self, share):
            answers = super().gather(share)
            completions.append(answers.rollout.completions())
            return answers

    class Noting(Optimizer):
        def step(self, norm):
            grads = [master.grad for master in self.masters.values() if master.grad is not None]
            gradients.append(torch.cat([grad.flatten() for grad in grads]).clone())
            super().step(norm)

    for collector in (trainer.collector, *([] if trainer.ahead is None else [trainer.ahead.collector])):
        collector.__class__ = NotingCollector
    for optimizer in trainer.learner.optimizers.values():
        optimizer.__class__ = Noting
    metrics = trainer.train()
    weights = {name: parameter.detach().clone() for name, parameter in trainer.roles.named_parameters()}
    return Run(completions, gradients, metrics, weights)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """size, kind -> the run of each rank; the kinds of `TOGETHER` in one set of processes."""
    found: dict[tuple[int, str], list[Run | str]] = {}

    def of(size: int, kind: str) -> list[Run]:
        if (size, kind) not in found:
            kinds = next(kinds for kinds in TOGETHER[size] if kind in kinds)
            ranks = run_ranks(size, train, str(tmp_path_factory.mktemp(f"ranks-{size}")), kinds)
            found.update({(size, kind): [by_kind[kind] for by_kind in ranks] for kind in kinds})
        each = found[size, kind]
        assert not any(isinstance(run, str) for run in each), "\n".join(map(str, each))
        return each

    return of


@pytest.mark.parametrize(("size", "kind"), SEVERAL)
def test_several_ranks_make_the_run_of_one(size, kind, runs):
    [alone], together = runs(1, kind), runs(size, kind)
    assert len(alone.gradients) == len(together[0].gradients) > 0
    for rank in together:
        assert rank.completions == alone.completions
        assert all(torch.equal(rank.weights[name], weight) for name, weight in together[0].weights.items())
    for number, (ours, theirs) in enumerate(zip(together[0].gradients, alone.gradients, strict=True)):
        assert_same_on_ranks(ours, theirs, f"gradient {number}")
    names = [name for name in alone.metrics if not name.startswith(OF_THE_MACHINE)]
    assert names == [name for name in together[0].metrics if not name.startswith(OF_THE_MACHINE)]
    for name in names:
        ours, theirs = (torch.tensor(run.metrics[name], dtype=torch.float64) for run in (together[0], alone))
        assert ours.isnan() == theirs.isnan(), name
        assert_same_on_ranks(ours.nan_to_num(), theirs.nan_to_num(), name)


def test_the_comparison_can_fail(runs):
    """Another kind's run is told from this one."""
    [ppo], [other] = runs(1, "ppo"), runs(1, "masked")
    with pytest.raises(AssertionError):
        assert_same_on_ranks(ppo.gradients[0], other.gradients[0])


def learn(folder: str) -> list[dict]:
    rates = {"optimizer__lr": 3e-3, "critic__lr": 3e-3}
    options = {"num_logged_samples": 0, "checkpoint__every": 0}
    trainer = build_trainer(folder, total_steps=STEPS, **rates, **options)
    trainer.train()
    return read_metrics(folder)


@pytest.mark.slow
def test_two_hundred_steps_give_the_same_curve(tmp_path):
    """Roundings do not grow: the rewards are equal in every step, the losses to 1e-5. It learns to say nothing but the letter a."""
    alone, together = (run_ranks(size, learn, str(tmp_path / str(size)))[0] for size in (1, 2))
    assert len(alone) == len(together) == STEPS
    for name in ("objective/scores", "completions/mean_length"):
        assert [row[name] for row in alone] == [row[name] for row in together]
    for name in ("loss/policy_avg", "loss/value_avg", "policy/entropy_avg"):
        ours, theirs = (torch.tensor([row[name] for row in rows], dtype=torch.float64) for rows in (together, alone))
        assert_same_on_ranks(ours, theirs, name)
    assert alone[0]["objective/scores"] < 0.1 and alone[-1]["objective/scores"] > 0.9
