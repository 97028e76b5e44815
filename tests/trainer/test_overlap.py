"""Completions that are sampled while the learner updates: from which weights, in which order, and what is left of them when a run ends."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

from fastppo import Callback, PPOConfig, PPOTrainer
from fastppo.ahead import SamplingAhead
from fastppo.checkpoint import list_checkpoints, load_checkpoint
from fastppo.collection import Collector
from fastppo.console import Reporter
from fastppo.errors import TrainingError
from fastppo.interruption import ENDING
from fastppo.rollout import Engine
from fastppo.run_folder import read_metrics
from tests.envs.worlds import Talk
from tests.tiny import make_model, make_tokenizer, ppo_config
from tests.tiny_trainer import PROMPTS, build_trainer, count_a, tiny_config
from tests.trainer.test_interruption import at_call, rows, weights

STALE = {
    "rollout__staleness": 1,
    "total_steps": 4,
    "checkpoint__every": 1,
    "checkpoint__keep": 10,
    "evaluation__every": 2,
    "optimizer__lr": 1e-2,
}
GROUPS = {"rollout__samples_per_prompt": 4, "rollout__prompts_per_step": 3}
KINDS = {
    "separate": {},
    "shared": {"critic__kind": "shared"},
    "lora": {"lora__r": 2, "reward__kl_coef": 0.1},
    "remax": {"advantage__estimator": "remax"},
    "dynamic_sampling": {"rollout__dynamic_sampling": True, "advantage__estimator": "rloo"} | GROUPS,
    "pools": {"difficulty__hard_weight": 0.5, "difficulty__min_samples": 1},
    "never": {"rollout__recompute_logprobs": "never"},
    "vtrace": {"advantage__estimator": "vtrace"},
}


@pytest.fixture(autouse=True)
def _nothing_is_left():
    """Handlers are those of a plain process, and no thread outlives a run."""
    before = {number: signal.signal(number, usual) for number, usual in ENDING.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    assert not sampling_threads()


def sampling_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fastppo-sampling"]


def build(folder, **changes) -> PPOTrainer:
    if changes.get("lora__r"):
        pytest.importorskip("peft", reason="pip install fastppo[lora]")
    return build_trainer(folder, eval_prompts=["ab"], **STALE | changes)


def assert_same_run(trainer, folder, expected, other):
    ours, theirs = weights(trainer), weights(expected)
    assert all(torch.equal(ours[name], x) for name, x in theirs.items())
    assert rows(folder) == rows(other)


# What is sampled


class KeepsWeights(Callback):
    """Of the policy, after every step."""

    def __init__(self) -> None:
        self.states: list[dict] = []

    def on_begin(self, trainer):
        self.on_step(trainer, {})

    def on_step(self, trainer, metrics):
        self.states.append({name: x.clone() for name, x in trainer.model.state_dict().items()})


@pytest.fixture
def taken(monkeypatch):
    """The rollouts that were learned from."""
    found, take = [], SamplingAhead.take

    def noting(self, show):
        answers, rows = take(self, show)
        found.append((answers.rollout, rows))
        return answers, rows

    monkeypatch.setattr(SamplingAhead, "take", noting)
    return found


def test_a_step_learns_from_the_weights_of_the_step_before(tmp_path, taken):
    """Sampled again by another engine from the weights of that moment, a rollout has the same bits."""
    kept = KeepsWeights()
    trainer = build(tmp_path / "run", callbacks=[kept])
    trainer.train()
    steps = [row for row in read_metrics(tmp_path / "run") if row["step"]]
    assert [row["rollout/staleness"] for row in steps] == [0, 1, 1, 1]
    assert steps[0]["rollout/sampler_kl"] == 0 < min(row["rollout/sampler_kl"] for row in steps[1:])
    assert all(row["time/overlap"] > 0 for row in steps[1:])
    model = make_model()
    engine = Engine(model, make_tokenizer())
    for step, (rollout, prompts) in enumerate(taken):
        model.load_state_dict(kept.states[max(0, step - 1)])
        sampling = trainer.config.rollout.sampling(step)  # with seed 0 a step's seed is its number
        again = engine.generate([row["prompt_ids"] for row in prompts], sampling)
        assert torch.equal(again.tokens, rollout.tokens) and torch.equal(again.logprobs, rollout.logprobs)


def test_what_is_sampled_does_not_depend_on_time(tmp_path, monkeypatch):
    """A thread that is late, and one that is done before the update has begun."""
    share, update = Collector.share, "fastppo.algorithms.ppo.ppo_loss"
    plain = build(tmp_path / "plain")
    plain.train()

    def late(self, *arguments, **options):
        time.sleep(0.1)
        return share(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Collector, "share", late)
        trainer = build(tmp_path / "late")
        trainer.train()
    assert_same_run(trainer, tmp_path / "late", plain, tmp_path / "plain")
    at_call(monkeypatch, update, 1, lambda: [thread.join() for thread in sampling_threads()])
    trainer = build(tmp_path / "early")
    trainer.train()
    assert_same_run(trainer, tmp_path / "early", plain, tmp_path / "plain")


def test_without_staleness_there_is_no_copy_and_no_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", None)
    trainer = build(tmp_path / "run", rollout__staleness=0)
    trainer.train()
    assert trainer.ahead is None
    assert not any("staleness" in name or "overlap" in name for row in read_metrics(tmp_path / "run") for name in row)


def test_frozen_weights_are_shared_with_the_copy(tmp_path):
    pytest.importorskip("peft", reason="pip install fastppo[lora]")
    trainer = build(tmp_path / "run", lora__r=2)
    own = dict(trainer.ahead.collector.engine.model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        assert (own[name] is parameter) == (not parameter.requires_grad), name
        assert not own[name].requires_grad


# How it is reckoned with


def test_weights_of_importance_are_those_of_policy_and_sampler(tmp_path, taken, monkeypatch):
    """The ratio is taken against the policy before the update, which a forward pass gives, and weighed by its ratio to what sampled."""
    seen = []
    trainer = build(tmp_path / "run")
    credit = trainer.algorithm.credit

    def noting(rollout, evaluation, scores):
        targets = credit(rollout, evaluation, scores)
        again = trainer.roles.evaluate(rollout, {"logprobs"}, [[[list(range(rollout.num_sequences))]]], "always")
        seen.append((rollout, evaluation.logprobs, targets.rollout_logprobs, again.logprobs))
        return targets

    monkeypatch.setattr(trainer.algorithm, "credit", noting)
    trainer.train()
    for rollout, old, sampled, policy in seen:
        assert torch.equal(sampled, rollout.processed_logprobs)
        assert torch.equal(old, policy)
    assert not any(torch.equal(old, sampled) for _, old, sampled, _ in seen[1:])


def test_staleness_is_corrected_unless_something_else_does():
    assert ppo_config(rollout__staleness=1).loss.rollout_correction == "truncate"
    assert ppo_config(rollout__staleness=1, loss__rollout_correction="mask").loss.rollout_correction == "mask"
    for other in ({"advantage__estimator": "vtrace"}, {"rollout__recompute_logprobs": "never"}):
        assert ppo_config(rollout__staleness=1, **other).loss.rollout_correction is None
    assert ppo_config().loss.rollout_correction is None


# Checkpoints, and how a run ends


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(tmp_path, kind):
    """As a kill leaves it, which no process can answer: whatever was in hand is sampled again from the weights in the checkpoint."""
    whole = build(tmp_path / "whole", **KINDS[kind])
    whole.train()
    killed = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", killed)
    for step, path in list_checkpoints(killed / "checkpoints").items():
        if step > 2:
            shutil.rmtree(path)
    trainer = build(killed, **KINDS[kind])
    trainer.train(resume=True)
    assert_same_run(trainer, killed, whole, tmp_path / "whole")
    assert [row["rollout/staleness"] for row in read_metrics(killed) if row["step"]] == [0, 1, 1, 1]


def test_more_steps_make_the_run_that_had_them_from_the_beginning(tmp_path):
    whole = build(tmp_path / "whole")
    whole.train()
    build(tmp_path / "run", total_steps=2, evaluation__every=2).train()
    trainer = build(tmp_path / "run")
    trainer.train(resume=True)
    assert_same_run(trainer, tmp_path / "run", whole, tmp_path / "whole")


def test_a_run_without_staleness_goes_on_with_it(tmp_path):
    build(tmp_path / "run", rollout__staleness=0, total_steps=2).train()
    trainer = build(tmp_path / "run")
    trainer.train(resume=True)
    assert [row.get("rollout/staleness") for row in read_metrics(tmp_path / "run") if row["step"]] == [None, None, 0, 1]
    back = build(tmp_path / "run", rollout__staleness=0, total_steps=5)
    back.train(resume=True)
    assert "rollout/staleness" not in read_metrics(tmp_path / "run")[-1]


# Moment -> (function, call of it, the step that is saved): the first two are the thread's.
MOMENTS = {
    "first rollout": ("fastppo.rollout.generation.sample_tokens", 5, 0),
    "sampling beside the first update": ("fastppo.rollout.generation.sample_tokens", 8, 1),
    "credit": ("fastppo.algorithms.advantages.gae", 2, 1),
    "update": ("fastppo.algorithms.ppo.ppo_loss", 3, 2),
    "checkpoint": ("fastppo.run_state.save_checkpoint", 1, 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_ends_thread_and_run_and_both_go_on(tmp_path, monkeypatch, moment):
    function, nth, saved = MOMENTS[moment]
    quiet = {"evaluation__every": 0}
    whole = build_trainer(tmp_path / "whole", **STALE | quiet)
    whole.train()
    trainer = build_trainer(tmp_path / "run", **STALE | quiet)
    with monkeypatch.context() as patch:
        at_call(patch, function, nth, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as end:
            trainer.train()
    assert end.value.code == 143 and not sampling_threads()
    assert max(list_checkpoints(tmp_path / "run" / "checkpoints"), default=0) == saved
    trainer.train(resume=True)  # the same trainer, as in a notebook
    assert_same_run(trainer, tmp_path / "run", whole, tmp_path / "whole")


def test_an_error_in_the_thread_ends_the_run_and_keeps_its_steps(tmp_path, monkeypatch):
    share, calls = Collector.share, []

    def failing(self, *arguments, **options):
        calls.append(threading.current_thread().name)
        if len(calls) == 3:
            raise TrainingError("the sandbox is gone")
        return share(self, *arguments, **options)

    monkeypatch.setattr(Collector, "share", failing)
    with pytest.raises(TrainingError, match="the sandbox is gone"):
        build_trainer(tmp_path / "run", **STALE | {"checkpoint__every": 0}).train()
    assert set(calls) == {"fastppo-sampling"}
    assert list(list_checkpoints(tmp_path / "run" / "checkpoints")) == [2]


def test_an_error_in_the_update_does_not_wait_for_the_thread(tmp_path, monkeypatch):
    """Sampling that would never end is dropped at its next token."""
    share, dropped = Collector.share, []

    def endless(self, rows, sampling, check, **options):
        if not dropped:
            dropped.append(False)
            return share(self, rows, sampling, check, **options)
        try:
            while True:
                check()
                time.sleep(0.01)
        finally:
            dropped.append(True)

    monkeypatch.setattr(Collector, "share", endless)
    at_call(monkeypatch, "fastppo.algorithms.ppo.ppo_loss", 2, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_trainer(tmp_path / "run", **STALE).train()
    assert dropped == [False, True] and not sampling_threads()


def test_memory_that_runs_out_in_the_thread_halves_what_goes_side_by_side(tmp_path, monkeypatch):
    whole = build_trainer(tmp_path / "whole", **STALE)
    whole.train()
    trainer = build_trainer(tmp_path / "run", **STALE)
    generate, failed = Engine.generate, []

    def limited(self, *arguments, **options):
        if self is trainer.ahead.collector.engine and trainer.step == 1 and not failed:
            failed.append(threading.current_thread().name)
            raise MemoryError("no room")
        return generate(self, *arguments, **options)

    monkeypatch.setattr(Engine, "generate", limited)
    trainer.train()
    assert failed == ["fastppo-sampling"] and trainer.ahead.collector.engine.max_batch_size == 4
    ours, theirs = weights(trainer), weights(whole)
    assert all(torch.equal(ours[name], x) for name, x in theirs.items())


def test_episodes_are_played_in_the_thread(tmp_path):
    def make(folder):
        config = tiny_config(folder, **STALE)
        keywords = {"config": config, "tokenizer": make_tokenizer(), "reporter": Reporter(4, quiet=True)}
        model = make_model(max_position_embeddings=128)
        return PPOTrainer(model, environment=Talk, prompts=PROMPTS, eval_prompts=["ab"], **keywords)

    whole = make(tmp_path / "whole")
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "killed" / "checkpoints" / f"step-{step:06d}")
    trainer = make(tmp_path / "killed")
    trainer.train(resume=True)
    ours, theirs = weights(trainer), weights(whole)
    assert all(torch.equal(ours[name], x) for name, x in theirs.items())
    assert [row["environment/turns"] for row in read_metrics(tmp_path / "killed") if row["step"]] == [3] * 4


def test_the_checkpoint_holds_the_weights_that_sampled(tmp_path):
    kept = KeepsWeights()
    build(tmp_path / "run", callbacks=[kept]).train()
    for step, path in list_checkpoints(tmp_path / "run" / "checkpoints").items():
        tensors, state, _ = load_checkpoint(path)
        assert state["sampled_ahead"] == {"version": step - 1}
        assert all(torch.equal(x, kept.states[step - 1][name]) for name, x in tensors["sampled_ahead"].items())


def test_the_page_names_settings_and_metrics_as_they_are(tmp_path):
    text = (Path(__file__).resolve().parents[2] / "docs" / "overlap.md").read_text()
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert PPOConfig(**settings).rollout.staleness == 1
    build(tmp_path / "run", total_steps=2).train()
    listed = set(re.findall(r"`((?:rollout|time)/\w+)`", text))
    assert len(listed) > 5 and listed <= read_metrics(tmp_path / "run")[-1].keys()
    assert (tmp_path / "run" / "checkpoints" / "step-000002" / "sampled_ahead.safetensors").exists()


# Learning

LEARNING = {
    "total_steps": 20,
    "rollout__prompts_per_step": 16,
    "rollout__samples_per_prompt": 4,
    "rollout__max_new_tokens": 4,
    "rollout__min_new_tokens": 4,
    "optimizer__lr": 4e-3,
    "critic__lr": 4e-3,
    "critic__kind": "shared",
    "learner__num_minibatches": 4,
    "learner__epochs": 2,
    "advantage__gae_lambda": 1.0,
    "checkpoint__every": 0,
    "num_logged_samples": 0,
}
WAYS = {
    "fresh": {"rollout__staleness": 0},
    "truncate": {},
    "mask": {"loss__rollout_correction": "mask"},
    "ratio to the sampler": {"rollout__recompute_logprobs": "never"},
    "vtrace": {"advantage__estimator": "vtrace", "critic__kind": "separate"},  # on one trunk it stays at 0.8 here
}


def mean_scores(folder, **changes) -> tuple[float, float]:
    """In the first step and over the last three: the share of the letter a, of which chance is 1/17."""
    prompts = ["a", "b"]
    settings = LEARNING | {"rollout__staleness": 1} | changes
    build_trainer(folder, reward=count_a, prompts=prompts, **settings).train()
    scores = [row["objective/scores"] for row in read_metrics(folder)]
    return scores[0], sum(scores[-3:]) / 3


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_stale_completions_teach_what_fresh_ones_do(tmp_path, way):
    first, last = mean_scores(tmp_path / "run", **WAYS[way])
    assert first < 0.15 and last > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["gae", "vtrace"])
def test_at_learning_rate_zero_nothing_is_learned_from_them(tmp_path, estimator):
    off = {"optimizer__lr": 0.0, "critic__lr": 0.0, "total_steps": 6}
    first, last = mean_scores(tmp_path / "run", advantage__estimator=estimator, **off)
    assert first < 0.15 and last < 0.15
