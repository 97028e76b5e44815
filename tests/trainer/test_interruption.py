"""A run that is asked to end, or that something ends, keeps every step that is done, and goes on bit for bit."""

from __future__ import annotations

import functools
import importlib
import os
import signal
import threading

import pytest
import torch

from fastppo import PPOConfig, PPOTrainer
from fastppo.checkpoint import list_checkpoints
from fastppo.console import Reporter
from fastppo.interruption import ENDING
from fastppo.run_folder import read_metrics
from fastppo.trainer import TrainingError
from tests.tiny import make_model, make_tokenizer
from tests.tiny_trainer import PROMPTS, count_a, tiny_config
from tests.trainer.test_resume import stable

SETTINGS = {"total_steps": 3, "evaluation__every": 2, "checkpoint__every": 0, "learner__epochs": 2}
pytestmark = pytest.mark.usefixtures("plain_signal_handlers")
CODES = {signal.SIGINT: None, signal.SIGTERM: 143, signal.SIGHUP: 129}


def build(output_dir, reward=count_a, **changes) -> PPOTrainer:
    config = tiny_config(output_dir, **(SETTINGS | changes))
    reporter = Reporter(config.total_steps, quiet=True)
    keywords = {"eval_prompts": ["ab"], "config": config, "tokenizer": make_tokenizer(), "reporter": reporter}
    return PPOTrainer(make_model(), reward=reward, prompts=PROMPTS, **keywords)


@pytest.fixture
def make(tmp_path):
    return functools.partial(build, tmp_path / "run")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    trainer = build(folder, score)
    trainer.train()
    return weights(trainer), rows(folder)


def weights(trainer):
    return {name: value.clone() for name, value in trainer.roles.state_dict().items()}


def rows(folder):
    return [stable(row) for row in read_metrics(folder)]


def assert_like(trainer, folder, uninterrupted):
    expected, metrics = uninterrupted
    assert all(torch.equal(value, expected[name]) for name, value in weights(trainer).items())
    assert rows(folder) == metrics


def at_call(monkeypatch, function: str, nth: int, act) -> None:
    """`act` just before the nth call of a function of a module."""
    module, _, name = function.rpartition(".")
    owner, calls = importlib.import_module(module), [0]
    original = getattr(owner, name)

    def acting(*args, **kwargs):
        calls[0] += 1
        if calls[0] == nth:
            act()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, acting)


# Moment -> (function, call of it, the step that is saved; 0 for none).
MOMENTS = {
    "first rollout": ("fastppo.rollout.generation.sample_tokens", 8, 0),
    "rollout": ("fastppo.rollout.generation.sample_tokens", 14, 1),
    "reward": ("tests.trainer.test_interruption.count_a", 3, 1),
    "credit": ("fastppo.algorithms.advantages.gae", 2, 1),
    "update": ("fastppo.algorithms.ppo.ppo_loss", 6, 2),
    "evaluation": ("tests.trainer.test_interruption.count_a", 4, 2),
    "records": ("fastppo.run_folder._line", 15, 2),
    "last checkpoint": ("fastppo.checkpoint.save_file", 1, 3),
}


def score(prompts, completions, **_):
    return count_a(prompts, completions)


@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGINT, "update"), (signal.SIGHUP, "reward"), *((signal.SIGTERM, moment) for moment in MOMENTS)],
    ids=str,
)
def test_a_signal_saves_and_the_run_goes_on_bitwise(make, tmp_path, monkeypatch, uninterrupted, number, moment):
    function, nth, saved = MOMENTS[moment]
    with monkeypatch.context() as patch:
        at_call(patch, function, nth, lambda: os.kill(os.getpid(), number))
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as end:
            make(reward=score).train()
    assert getattr(end.value, "code", None) == CODES[number]
    assert all(signal.getsignal(number) is usual for number, usual in ENDING.items()), (
        "the handlers are those of before"
    )
    folder = tmp_path / "run"
    assert list(list_checkpoints(folder / "checkpoints")) == ([saved] if saved else [])
    trainer = make(reward=score)
    trainer.train(resume=True)
    assert_like(trainer, folder, uninterrupted)


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_same_trainer_goes_on(make, tmp_path, monkeypatch, uninterrupted, moment):
    """In a notebook the trainer outlives Ctrl-C."""
    function, nth, saved = MOMENTS[moment]
    trainer = make(reward=score)
    with monkeypatch.context() as patch:
        at_call(patch, function, nth, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    assert trainer.step == saved
    trainer.evaluate()
    trainer.train(resume=True)
    assert_like(trainer, tmp_path / "run", uninterrupted)


def test_a_second_signal_ends_at_once(make, monkeypatch, tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_call(monkeypatch, "fastppo.algorithms.ppo.ppo_loss", 6, twice)
    trainer = make()
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.step == 1 and not list_checkpoints(tmp_path / "run" / "checkpoints"), "in the middle of an update"


def test_signals_that_somebody_else_handles_stay_theirs(make):
    seen = []
    signal.signal(signal.SIGTERM, lambda *arguments: seen.append(arguments))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup

    def reward(prompts, completions, **_):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
        return count_a(prompts, completions)

    make(reward=reward, total_steps=1).train()
    assert seen


def interrupt():
    raise KeyboardInterrupt


def run_in_a_thread(trainer) -> BaseException:
    """What `train` raised there, where no signal can be handled."""
    raised = []

    def train():
        try:
            trainer.train()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    return raised[0]


@pytest.mark.parametrize("moment", ["first rollout", "rollout", "reward", "credit", "evaluation"])
def test_an_interruption_in_a_thread_saves_too(make, tmp_path, monkeypatch, uninterrupted, moment):
    function, nth, saved = MOMENTS[moment]
    trainer = make(reward=score)
    with monkeypatch.context() as patch:
        at_call(patch, function, nth, interrupt)
        assert isinstance(run_in_a_thread(trainer), KeyboardInterrupt)
    assert list(list_checkpoints(tmp_path / "run" / "checkpoints")) == ([saved] if saved else [])
    trainer.train(resume=True)
    assert_like(trainer, tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("step", [0, 1])
def test_a_half_done_update_is_never_taken_for_a_step(make, tmp_path, monkeypatch, step):
    """Without a checkpoint nothing can undo it: refused, and the records stay."""
    trainer = make()
    with monkeypatch.context() as patch:
        at_call(patch, "fastppo.algorithms.ppo.ppo_loss", 2 + 4 * step, interrupt)
        assert isinstance(run_in_a_thread(trainer), KeyboardInterrupt)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="no checkpoint"):
        trainer.train(resume=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before


def test_a_half_done_update_is_undone_from_the_checkpoint_before_it(make, tmp_path, monkeypatch, uninterrupted):
    trainer = make(reward=score, checkpoint__every=1)
    with monkeypatch.context() as patch:
        at_call(patch, "fastppo.algorithms.ppo.ppo_loss", 6, interrupt)
        assert isinstance(run_in_a_thread(trainer), KeyboardInterrupt)
    trainer.train(resume=True)
    assert_like(trainer, tmp_path / "run", uninterrupted)


def test_a_run_that_cannot_go_on_keeps_its_steps(make, tmp_path, uninterrupted):
    """Beside the older checkpoints, not in place of one: what ended the run may be in these weights."""
    calls = []

    def fails_in_the_third_step(prompts, completions, **_):
        calls.append(1)
        return count_a(prompts, completions) if len(calls) < 5 else 1 / 0

    fails_in_the_third_step.__name__ = "score"
    with pytest.raises(TrainingError, match="ZeroDivisionError"):
        make(reward=fails_in_the_third_step, checkpoint__keep=1, reward__retries=0).train()
    assert list(list_checkpoints(tmp_path / "run" / "checkpoints")) == [2]
    trainer = make(reward=score)
    trainer.train(resume=True)
    assert_like(trainer, tmp_path / "run", uninterrupted)


def test_a_failure_to_save_does_not_hide_what_ended_the_run(make, tmp_path, monkeypatch):
    monkeypatch.setattr("fastppo.checkpoint.save_file", interrupt_with_a_full_disk)
    at_call(monkeypatch, "fastppo.algorithms.advantages.gae", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        make().train()


def interrupt_with_a_full_disk(*arguments, **keywords):
    raise OSError(28, "No space left on device")


def test_a_default_run_saves_on_its_way():
    assert 0 < PPOConfig().checkpoint.every <= PPOConfig().total_steps // 5
