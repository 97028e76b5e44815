"""The user's own code between the steps: when it is called, how it ends a run, and what its errors cost."""

from __future__ import annotations

import re

import pytest
import torch

from fastppo import Callback
from fastppo.checkpoint import list_checkpoints
from fastppo.errors import CheckpointError
from fastppo.run_folder import read_metrics


class Log(Callback):
    """What is called, in order, with the step."""

    def __init__(self):
        self.calls = []

    def on_begin(self, trainer):
        self.calls.append(("begin", trainer.step))

    def on_evaluation(self, trainer, metrics):
        assert "eval/scores" in metrics and "lr" not in metrics
        self.calls.append(("evaluation", trainer.step))

    def on_step(self, trainer, metrics):
        assert "lr" in metrics
        metrics.clear()  # a copy of its own
        self.calls.append(("step", trainer.step))

    def on_checkpoint(self, trainer, path):
        assert path.name == f"step-{trainer.step:06d}" and path.is_dir()
        self.calls.append(("checkpoint", trainer.step))

    def on_end(self, trainer, metrics):
        assert "lr" in metrics
        self.calls.append(("end", trainer.step))


def test_when_they_are_called(make_trainer, tmp_path):
    logs = [Log(), Log()]
    make_trainer(eval_prompts=["ab"], total_steps=3, checkpoint__every=2, callbacks=logs).train()
    expected = [("begin", 0), ("evaluation", 0), ("step", 1), ("step", 2), ("checkpoint", 2)]
    expected += [("evaluation", 3), ("step", 3), ("checkpoint", 3), ("end", 3)]
    assert logs[0].calls == logs[1].calls == expected
    assert all("lr" in row for row in read_metrics(tmp_path / "run")[1:])


def test_they_change_no_bit(make_trainer, tmp_path):
    class Busy(Callback):
        def on_step(self, trainer, metrics):
            torch.rand(3)
            trainer.evaluate()

    weights = []
    for name, callbacks in (("with", [Busy()]), ("without", [])):
        trainer = make_trainer(eval_prompts=["ab"], output_dir=tmp_path / name, callbacks=callbacks)
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())


class StopAt(Callback):
    def __init__(self, event, step):
        def stop(trainer, *_):
            if trainer.step == step:
                trainer.stop("seen enough")

        setattr(self, event, stop)


@pytest.mark.parametrize(
    ("event", "at", "last"), [("on_begin", 0, 0), ("on_evaluation", 0, 0), ("on_step", 2, 2), ("on_checkpoint", 2, 2)]
)
def test_one_ends_the_run_as_its_last_step_would(make_trainer, tmp_path, event, at, last):
    """With a checkpoint and the model; a resume goes on from there to the bits of a run that was not stopped."""
    changes = {"eval_prompts": ["ab"], "total_steps": 4, "checkpoint__every": 2}
    trainer = make_trainer(callbacks=[StopAt(event, at)], **changes)
    notes = []
    trainer.reporter.note = notes.append
    trainer.train()
    assert trainer.step == last and trainer.stopped == "seen enough"
    assert f"ended after step {last} of 4: seen enough" in notes
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert list(list_checkpoints(tmp_path / "run" / "checkpoints")) == ([last] if last else [])
    resumed, whole = make_trainer(**changes), make_trainer(**changes, output_dir=tmp_path / "whole")
    resumed.train(resume=True)
    whole.train()
    ours = resumed.model.state_dict()
    assert resumed.step == 4 and all(torch.equal(ours[name], value) for name, value in whole.model.state_dict().items())


@pytest.mark.parametrize("event", ["on_begin", "on_evaluation", "on_step", "on_checkpoint", "on_end"])
def test_an_error_in_one_ends_the_run_with_its_steps_saved(make_trainer, tmp_path, event):
    class Failing(Callback):
        pass

    def fail(self, trainer, *_):
        if event == "on_begin" or trainer.step == 2:
            raise LookupError("no such dashboard")

    setattr(Failing, event, fail)
    changes = {"eval_prompts": ["ab"], "total_steps": 2, "checkpoint__every": 0}
    with pytest.raises(LookupError, match="no such dashboard"):
        make_trainer(callbacks=[Failing()], **changes).train()
    steps = [] if event == "on_begin" else [2]
    assert list(list_checkpoints(tmp_path / "run" / "checkpoints")) == steps
    resumed = make_trainer(**changes)
    resumed.train(resume=True)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2]


class Odd(Callback):
    def state_dict(self):
        return {"seen": {1, 2}}


def test_a_state_that_json_cannot_hold_is_an_error_that_says_so(make_trainer):
    with pytest.raises(CheckpointError, match="set is not JSON serializable"):
        make_trainer(callbacks=[Odd()], total_steps=1).train()


class OnStepEnd(Callback):
    def on_step_end(self, trainer, metrics):
        pass


@pytest.mark.parametrize(
    ("callbacks", "error", "message"),
    [
        (Log(), TypeError, "callbacks is Log, expected a list of fastppo.Callback"),
        (
            [Log],
            TypeError,
            "callbacks[0] is the class Log, expected an object of a class derived from fastppo.Callback",
        ),
        ([Log(), print], TypeError, "callbacks[1] is builtin_function_or_method"),
        (
            [OnStepEnd()],
            ValueError,
            "callbacks[0] has a method on_step_end, which nothing calls; the nearest is on_step",
        ),
    ],
)
def test_what_is_no_callback_is_refused_before_anything_is_written(make_trainer, tmp_path, callbacks, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make_trainer(callbacks=callbacks)
    assert not (tmp_path / "run").exists()
