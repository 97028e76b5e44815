"""Where memory runs out in a step, the same minibatch is repeated in smaller parts, and the run goes on as one with a smaller budget would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastppo.algorithms import trpo, trust_region
from fastppo.errors import TrainingError
from fastppo.out_of_memory import is_out_of_memory
from fastppo.plan import Lengths, plan_epochs, split_again, tokens_of
from fastppo.roles import Roles
from fastppo.rollout.generation import Generation
from fastppo.run_folder import read_metrics
from tests.trainer.test_resume import stable

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "total_steps": 2,
    "rollout__samples_per_prompt": 2,
    "reward__kl_coef": 0.05,
    "checkpoint__every": 1,
    "learner__epochs": 2,
}
ERRORS = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory."),
    "kernel": MemoryError(),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: ..."
    ),
}


@pytest.fixture
def limit_tokens(monkeypatch):
    """limit_tokens(n, error): a forward pass over more tokens fails halfway; returns the tokens of those that were tried."""
    forward, tried = Roles.forward, []

    def limit(most: int, error: BaseException = ERRORS["gpu"], scoring: bool = True) -> list[int]:
        def limited(self, rollout, **wants):
            tried.append(len(rollout.tokens))
            outputs = forward(self, rollout, **wants)
            if len(rollout.tokens) > most and (scoring or torch.is_grad_enabled()):
                raise error
            return outputs

        monkeypatch.setattr(Roles, "forward", limited)
        return tried

    return limit


def notes_of(trainer) -> list[str]:
    notes: list[str] = []
    trainer.reporter.note = trainer.learner.budget._note = trainer.collector._note = notes.append
    return notes


def weights(trainer) -> dict[str, torch.Tensor]:
    return {
        f"{role}/{name}": x.clone()
        for role, own in trainer.roles.trained().items()
        for name, x in own.state_dict().items()
    }


def assert_same(one, other, folders) -> None:
    ours, theirs = weights(one), weights(other)
    assert all(torch.equal(ours[name], x) for name, x in theirs.items())
    rows = [list(map(stable, read_metrics(folder))) for folder in folders]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("algorithm", "kind", "scoring"), [("ppo", "gpu", True), ("ppo", "kernel", False), ("trpo", "cpu", False)]
)
def test_a_run_goes_on_as_one_with_the_smaller_budget(make_trainer, tmp_path, limit_tokens, algorithm, kind, scoring):
    """Whether memory runs out when the rollout is scored, or first in an update; by then gradients of other micro-batches are there."""
    settings = SETTINGS | {"algorithm": algorithm}
    limit_tokens(40, ERRORS[kind], scoring)
    trainer = make_trainer(**settings)
    notes = notes_of(trainer)
    trainer.train()
    found = trainer.learner.budget.tokens
    assert found <= 40 and 1 <= len(notes) <= 4 and f"at most {found} tokens run together" in notes[-1]
    small = make_trainer(output_dir=tmp_path / "small", learner__tokens_per_microbatch=found, **settings)
    quiet = notes_of(small)
    small.train()
    assert not quiet or "memory" not in quiet[0]
    assert_same(trainer, small, [tmp_path / "run", tmp_path / "small"])


def test_the_smaller_budget_stays_with_the_run(make_trainer, tmp_path, limit_tokens):
    tried = limit_tokens(40)
    make_trainer(**SETTINGS | {"total_steps": 1}).train()
    resumed = make_trainer(**SETTINGS)
    tried.clear()
    resumed.train(resume=True)
    assert max(tried) <= 40
    changed = make_trainer(**SETTINGS | {"total_steps": 3, "learner__tokens_per_microbatch": 20})
    changed.train(resume=True)
    assert changed.learner.budget.tokens == 20, "a setting that has been changed counts"


@pytest.mark.parametrize("kind", ERRORS)
def test_a_rollout_is_sampled_again_with_fewer_side_by_side(make_trainer, tmp_path, monkeypatch, kind):
    """Halfway through, when some have ended: weights and metrics are those of a run without a limit, bit for bit, but for how full the batch was."""
    advance, tried = Generation.advance, []

    def limited(self):
        ended = advance(self)
        tried.append(self.slots)
        if self.slots > 3 and len(tried) % 4 == 0:
            raise ERRORS[kind]
        return ended

    plain = make_trainer(output_dir=tmp_path / "plain", **SETTINGS)
    plain.train()
    monkeypatch.setattr(Generation, "advance", limited)
    trainer = make_trainer(**SETTINGS)
    notes = notes_of(trainer)
    trainer.train()
    assert max(tried) == 16 and tried[-1] == 2 and trainer.engine.max_batch_size == 2
    assert sum("memory ran out" in note for note in notes) == 3 and "rollout.batch_size=2 would spare" in "".join(notes)
    ours, theirs = weights(trainer), weights(plain)
    assert all(torch.equal(ours[name], x) for name, x in theirs.items())
    rows = [list(map(stable, read_metrics(tmp_path / name))) for name in ("run", "plain")]
    assert [row | {"rollout/occupancy": None} for row in rows[0]] == [
        row | {"rollout/occupancy": None} for row in rows[1]
    ]


def test_one_sequence_that_cannot_be_sampled_ends_the_run(make_trainer, monkeypatch):
    def failing(self):
        raise ERRORS["gpu"]

    monkeypatch.setattr(Generation, "advance", failing)
    with pytest.raises(
        TrainingError, match=r"memory ran out while one sequence alone was sampled .*rollout.max_new_tokens"
    ):
        make_trainer(**SETTINGS).train()


def test_an_optimizers_step_is_not_tried_again(make_trainer, tmp_path, monkeypatch):
    """Some weights have moved: the run ends, and goes on from the step before."""
    trainer = make_trainer(**SETTINGS)
    step = trainer.learner.optimizers["critic"].step

    def failing(norm):
        if trainer.step == 1:
            raise ERRORS["cpu"]
        step(norm)

    monkeypatch.setattr(trainer.learner.optimizers["critic"], "step", failing)
    with pytest.raises(TrainingError, match=r"memory ran out in the optimizer's step .*optimizer.name=adamw_8bit"):
        trainer.train()
    resumed = make_trainer(**SETTINGS)
    resumed.train(resume=True)
    whole = make_trainer(output_dir=tmp_path / "whole", **SETTINGS)
    whole.train()
    assert_same(resumed, whole, [tmp_path / "run", tmp_path / "whole"])


def test_one_sequence_that_does_not_fit_ends_the_run(make_trainer, tmp_path, limit_tokens):
    limit_tokens(1)
    trainer = make_trainer(**SETTINGS)
    with pytest.raises(
        TrainingError, match=r"memory ran out for one sequence of at most \d+ tokens alone .*gradient_checkpointing"
    ):
        trainer.train()


def test_other_errors_are_not_taken_for_it(make_trainer, limit_tokens):
    tried = limit_tokens(40, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        make_trainer(**SETTINGS).train()
    assert len(tried) == 1
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator")) and all(map(is_out_of_memory, ERRORS.values()))


def test_trpo_is_back_at_its_weights(make_trainer, monkeypatch):
    """Memory that runs out on the line search has moved the policy already."""
    compare, calls, moved = trpo.PolicyStep.compare, [], []

    def failing(self, *records):
        calls.append(len(self.batches))
        if len(calls) == 1:
            moved.append(not torch.equal(trust_region.flat([p.detach() for p in self.parameters]), self.theta))
            raise ERRORS["gpu"]
        if len(calls) == 2:
            moved.append(self.theta)
        return compare(self, *records)

    monkeypatch.setattr(trpo.PolicyStep, "compare", failing)
    trainer = make_trainer(algorithm="trpo", total_steps=1, rollout__samples_per_prompt=4)
    before = trust_region.flat([p.detach().clone() for p in trainer.learner.optimizers["policy"].parameters.values()])
    trainer.train()
    assert moved[0] and torch.equal(moved[1], before) and calls[1] > calls[0]


def test_a_plan_is_cut_again_as_it_would_have_been_made():
    lengths = Lengths([9, 7, 7, 12, 5, 6], [3, 3, 3, 4, 4, 2], [0, 0, 0, 1, 1, 2])
    large, small = (plan_epochs(lengths, epochs=2, num_minibatches=2, max_tokens=n, seed=3) for n in (100, 14))
    assert split_again(large, lengths, 14) == small != large
    assert tokens_of([0, 1, 2], lengths) == 17 and tokens_of([3, 5], lengths) == 18


# A minibatch whose activations are more than the process may have; the limit is lifted for the run with the smaller budget.
LIMITED = """
import resource, sys
import torch
torch.set_num_threads(1)
from fastppo.algorithms.ppo import PPO
from fastppo.learner import Learner
from fastppo.model import prepare_model
from fastppo.plan import Lengths
from fastppo.roles import Roles
from fastppo.rollout import Engine, SamplingParams
from fastppo.targets import Targets
from tests.tiny import make_model, ppo_config

def train(tokens, limited):
    notes, before = [], resource.getrlimit(resource.RLIMIT_AS)
    config = ppo_config(learner__tokens_per_microbatch=tokens, learner__num_minibatches=1, learner__epochs=1, critic__kind="shared")
    model = prepare_model(make_model(intermediate_size=4096, num_hidden_layers=2))
    roles = Roles(model, critic="shared")
    rollout = Engine(model).generate([[2, 3, 4]] * 32, SamplingParams(max_new_tokens=29, min_new_tokens=29))
    sections = {"optimizer": config.optimizer, "critic": config.critic, "config": config.learner}
    learner, algorithm = Learner(roles, **sections, total_steps=1, note=notes.append), PPO(config)
    plan = learner.plan(rollout, seed=0)
    small = Roles.evaluate(roles, rollout, {"logprobs", "values"}, [[[[i] for i in range(32)]]])
    targets = Targets(rollout.action_bounds, advantages=torch.ones(rollout.num_actions), returns=torch.ones(rollout.num_actions))
    if limited:
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (40 << 20), before[1]))
    metrics = algorithm.update(learner, rollout, small, targets, plan)
    resource.setrlimit(resource.RLIMIT_AS, before)
    return learner, notes, metrics

learner, notes, metrics = train(8192, True)
print(len(notes), learner.budget.tokens, notes[0][:60])
other, none, expected = train(learner.budget.tokens, False)
pairs = zip(learner.roles.parameters(), other.roles.parameters(), strict=True)
assert all(torch.equal(a, b) for a, b in pairs) and metrics == expected and not none
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a process's memory is limited as on Linux")
def test_with_a_limit_on_the_processs_memory():
    done = subprocess.run([sys.executable, "-c", LIMITED], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    halvings, tokens, note = done.stdout.split(maxsplit=2)
    assert 1 <= int(halvings) <= 6 and int(tokens) < 1024 and note.startswith("memory ran out (")
