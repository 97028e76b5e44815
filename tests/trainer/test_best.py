"""The best step is kept, a run ends where nothing improves any more, and a killed run goes on to the same end."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastppo import Callback, cli
from fastppo.best import Best
from fastppo.checkpoint import list_checkpoints, load_checkpoint
from fastppo.errors import TrainingError
from fastppo.evaluation_config import EvaluationConfig
from fastppo.export import export_run
from fastppo.model import load_model
from fastppo.run_folder import read_metrics
from tests.tiny import make_model, make_tokenizer
from tests.tiny_trainer import count_a

HELD_OUT = ["ponm"]
EVERY_STEP = {"evaluation__every": 1, "checkpoint__every": 1, "total_steps": 8}


def curve(values):
    """A reward and a list for the trainer: after step i a held-out completion has score values[i]."""
    trainers = []

    def reward(prompts, completions, **_):
        held_out = values[min(trainers[-1].step, len(values) - 1)]
        plain = count_a(prompts, completions)
        return [held_out if prompt in HELD_OUT else score for prompt, score in zip(prompts, plain, strict=True)]

    return reward, trainers


def made(make_trainer, values, **changes):
    reward, trainers = curve(values)
    trainers.append(make_trainer(reward, eval_prompts=HELD_OUT, **EVERY_STEP | changes))
    return trainers[-1]


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_metrics(folder)]


@pytest.mark.parametrize(
    ("values", "changes", "last"),
    [
        ([0, 1, 2, 2, 1, 3, 3, 3, 3], {"evaluation__patience": 2}, 4),
        ([0, 1, 2, 2, 3, 3, 1, 3, 3], {"evaluation__patience": 3}, 7),
        ([0, 0.6, 1.2, 1.8, 2.4, 2.4, 2.4, 3, 3], {"evaluation__patience": 2, "evaluation__min_improvement": 1}, 6),
        ([3, 2, 1, 1, 1, 0, 0, 0, 0], {"evaluation__patience": 2, "evaluation__goal": "min"}, 4),
        ([0] * 9, {"evaluation__patience": 3, "evaluation__every": 2}, 6),
        ([0] * 9, {}, 8),
    ],
)
def test_a_run_ends_where_nothing_improves(make_trainer, tmp_path, values, changes, last):
    """Slow progress that adds up to more than `min_improvement` is progress: 0.6 a step."""
    trainer = made(make_trainer, values, **changes)
    metrics = trainer.train()
    assert steps(tmp_path / "run")[-1] == last == trainer.step and metrics["eval/scores"] == values[last]
    assert (trainer.stopped is None) == (last == 8)
    assert max(list_checkpoints(tmp_path / "run" / "checkpoints")) == last
    assert (tmp_path / "run" / "model" / "model.safetensors").exists() and not (tmp_path / "run" / "best").exists()


def test_what_ended_early_stays_ended_unless_it_is_given_more_patience(make_trainer, tmp_path):
    values = [0, 1, 1, 1, 2, 2, 2, 2, 2]
    made(make_trainer, values, evaluation__patience=2).train()
    again = made(make_trainer, values, evaluation__patience=2)
    notes = []
    again.reporter.note = notes.append
    assert again.train(resume=True) == {} and steps(tmp_path / "run")[-1] == 3
    said = (
        "ended after step 3 of 8: 2 evaluations in a row without an improvement: eval/scores was best after step 1, 1"
    )
    assert said in notes
    made(make_trainer, values, evaluation__patience=3).train(resume=True)
    assert steps(tmp_path / "run")[-1] == 7


def test_the_best_step_is_kept(make_trainer, tmp_path):
    """Its checkpoint beside the newest, its model in `best`, bit for bit; it may be the model that the run began with."""
    for name, values, best in (("middle", [0, 1, 3, 2, 3, 1, 1, 1, 1], 2), ("first", [5, 1, 3, 2, 3, 1, 1, 1, 1], 0)):
        folder, weights = tmp_path / name, {}

        class Copy(Callback):
            def on_evaluation(self, trainer, metrics, weights=weights):
                weights[trainer.step] = {key: value.clone() for key, value in trainer.model.state_dict().items()}

        changes = {"output_dir": folder, "checkpoint__keep": 1, "evaluation__keep_best": True, "callbacks": [Copy()]}
        made(make_trainer, values, **changes).train()
        assert list(list_checkpoints(folder / "checkpoints")) == [best, 8]
        for path in (folder / "best", export_run(folder, tmp_path / f"{name}-best", best=True, model=folder / "model")):
            written = load_model(path, dtype="float32", device="cpu").state_dict()
            assert written.keys() == weights[best].keys()
            assert all(torch.equal(written[key], value) for key, value in weights[best].items())


def test_a_tied_model_is_written_once(make_trainer, tmp_path):
    made(
        make_trainer, [0, 1, 0], model=make_model(tie_word_embeddings=True), evaluation__keep_best=True, total_steps=2
    ).train()
    written = {name: load_file(tmp_path / "run" / name / "model.safetensors").keys() for name in ("best", "model")}
    assert written["best"] == written["model"] and "lm_head.weight" not in written["best"]


def test_export_says_where_there_is_no_best(make_trainer, tmp_path):
    made(make_trainer, [0, 1, 0], total_steps=2, checkpoint__keep=1).train()
    with pytest.raises(ValueError, match=r"no checkpoint of its best step, expected a run with evaluation.keep_best"):
        export_run(tmp_path / "run", best=True)
    with pytest.raises(ValueError, match="step is 2 and best is True"):
        export_run(tmp_path / "run", best=True, step=2)


def test_an_unknown_metric_is_named_with_the_nearest_and_nothing_is_recorded(make_trainer, tmp_path):
    trainer = made(make_trainer, [0], evaluation__metric="eval/score")
    with pytest.raises(
        ValueError, match="evaluation.metric is 'eval/score', which no evaluation .* nearest is eval/scores"
    ):
        trainer.train()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("metric", "goal", "better"),
    [
        ("eval/scores", None, 2),
        ("eval/hard/pass@4", None, 2),
        ("eval/failures", None, 1),
        ("eval/hard/mean_length", None, 1),
        ("eval/mean_length", "max", 2),
    ],
)
def test_which_values_are_better(metric, goal, better):
    best = Best(EvaluationConfig(metric=metric, goal=goal))
    for step in (1, 2):
        best.update(step, {metric: float(step)})
    assert best.step == better


def test_no_number_is_no_improvement():
    best = Best(EvaluationConfig(patience=2, every=1, keep_best=True))
    best.update(0, {"eval/scores": float("nan")})
    assert best.step is None and best.spared == set() and best.stopped is None
    best.update(1, {"eval/scores": float("nan")})
    assert best.stopped == "2 evaluations in a row without an improvement: eval/scores was never a number"


def test_a_best_checkpoint_that_was_removed_is_named(make_trainer, tmp_path):
    """The last model is written all the same."""

    class Remove(Callback):
        def on_step(self, trainer, metrics):
            if trainer.step == 2:
                shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000001")

    changes = {"evaluation__keep_best": True, "total_steps": 2, "callbacks": [Remove()]}
    with pytest.raises(
        TrainingError, match="run/best could not be written: the checkpoint of the best step, 1, has been"
    ):
        made(make_trainer, [0, 1, 0], **changes).train()
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_another_metric_begins_anew(make_trainer, tmp_path):
    made(make_trainer, [0, 5, 5], total_steps=2, evaluation__keep_best=True).train()
    resumed = made(
        make_trainer, [0, 5, 5], evaluation__metric="eval/mean_length", evaluation__keep_best=True, total_steps=3
    )
    resumed.train(resume=True)
    assert resumed.best.step == 3


def test_a_lost_best_checkpoint_is_said_and_the_best_chosen_anew(make_trainer, tmp_path):
    """As where `keep_best` is set for a run that began without."""
    values = [0, 5, 1, 1, 1, 2, 1]
    made(make_trainer, values, total_steps=4, checkpoint__keep=1).train()
    resumed = made(make_trainer, values, total_steps=6, checkpoint__keep=1, evaluation__keep_best=True)
    notes = []
    resumed.reporter.note = notes.append
    resumed.train(resume=True)
    assert "the best step, 1, has no checkpoint: the best is chosen anew" in notes and resumed.best.step == 5
    assert list(list_checkpoints(tmp_path / "run" / "checkpoints")) == [5, 6]


RECIPE = """
output_dir: {folder}/run
total_steps: 5
device: cpu
model: {{name: {folder}/start}}
data:
  path: prompts.jsonl
  eval_sets:
    short: {{path: prompts.jsonl, size: 1}}
    all: {{path: prompts.jsonl}}
rollout: {{prompts_per_step: 2, max_new_tokens: 4}}
reward: {{timeout: null, functions: [{{function: "same.py:same"}}]}}
evaluation: {{every: 1, patience: 1, keep_best: true, metric: eval/all/scores}}
"""


def test_on_the_command_line(tmp_path, capsys):
    """A recipe with several sets ends early, says so again when it is resumed, and has a best model to export."""
    make_model().save_pretrained(tmp_path / "start")
    make_tokenizer().save_pretrained(tmp_path / "start")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "cde"}\n')
    (tmp_path / "same.py").write_text("def same(prompts, completions, **_):\n    return [0.5] * len(prompts)\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=tmp_path))
    assert cli.main(["train", str(recipe)]) == 0
    assert "ended after step 1 of 5" in (said := capsys.readouterr().out) and "done: reward 0.500" in said
    assert cli.main(["train", str(recipe), "--resume"]) == 0
    assert "has ended early, 1 evaluation in a row without an improvement" in capsys.readouterr().out
    assert {"eval/short/scores", "eval/all/mean_length"} <= read_metrics(tmp_path / "run")[-1].keys()
    assert cli.main(["export", str(tmp_path / "run"), "--best"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "best")


class Counter(Callback):
    """A callback with a state; it kills the process where it is told to."""

    def __init__(self, kill_at=None):
        self.seen, self._kill_at = 0, kill_at

    def on_step(self, trainer, metrics):
        self.seen += 1
        if trainer.step == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


@pytest.mark.parametrize("kill_at", [1, 3, 4])
@pytest.mark.parametrize("every", [1, 2])
def test_a_killed_run_goes_on_to_the_same_end(make_trainer, tmp_path, kill_at, every):
    """Best step, patience, difficulty pools and the state of callbacks, bit for bit."""
    values = [0, 1, 2, 1, 1, 1, 3, 3, 3]
    changes = {
        "evaluation__patience": 3,
        "checkpoint__keep": 1,
        "evaluation__keep_best": True,
        "checkpoint__every": every,
        "rollout__prompts_per_step": 4,
        "rollout__samples_per_prompt": 2,
        "difficulty__hard_weight": 0.3,
        "difficulty__easy_weight": 0.5,
        "difficulty__min_samples": 1,
        "reward__solved_score": 0.1,
    }
    whole = made(make_trainer, values, **changes, output_dir=tmp_path / "whole", callbacks=[Counter()])
    whole.train()
    assert whole.step == 5, "2 was the best"
    child = os.fork()
    if child == 0:
        try:
            made(make_trainer, values, **changes, callbacks=[Counter(kill_at)]).train()
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    counter = Counter()
    resumed = made(make_trainer, values, **changes, callbacks=[counter])
    resumed.train(resume=True)
    assert resumed.step == 5 and resumed.best.step == 2 and counter.seen == 5
    for name in ("run", "whole"):
        assert list(list_checkpoints(tmp_path / name / "checkpoints")) == [2, 5]
    for step in (2, 5):
        ours, theirs = (
            load_checkpoint(tmp_path / name / "checkpoints" / f"step-{step:06d}") for name in ("run", "whole")
        )
        assert without_clock(ours[1]) == without_clock(theirs[1]), "every state"
        for file, tensors in theirs[0].items():
            assert all(torch.equal(ours[0][file][name], value) for name, value in tensors.items()), file
    rows = [[without_clock(row) for row in read_metrics(tmp_path / name)] for name in ("run", "whole")]
    assert rows[0] == rows[1]


def without_clock(state: dict) -> dict:
    """What neither a clock nor the process's memory decides."""
    return {name: value for name, value in state.items() if not re.match("time/|perf/", name)}
