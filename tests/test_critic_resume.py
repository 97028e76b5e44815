"""The pretraining of a critic that is interrupted or killed goes on from its checkpoint, on a CPU to the same bits."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from fastppo import checkpoint, cli
from fastppo.checkpoint import list_checkpoints
from fastppo.critic_training import train_critic
from fastppo.errors import CheckpointError, TrainingError
from fastppo.recipe_config import Recipe
from fastppo.run_folder import METRICS, RunFolder, read_metrics
from tests.test_critic_training import early, rows_of, write
from tests.tiny import make_model, make_tokenizer

pytestmark = pytest.mark.usefixtures("plain_signal_handlers")


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """A folder with a language model, `base`, and 60 completions that differ in what they score."""
    folder = tmp_path_factory.mktemp("material")
    make_model().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    write(folder / "rollouts.jsonl", rows_of(60, score=lambda draw, prompt, text: early(text)))
    return folder


def recipe_of(material: Path, **changes) -> Recipe:
    """Two passes of four steps (of 16, 16, 16 and what is left); a checkpoint after every third."""
    settings = {
        "device": "cpu",
        "model": {"name": str(material / "base")},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_new_tokens": 6},
        "learner": {"num_minibatches": 2},
        "critic": {"lr": 3e-3, "epochs": 2, "lr_warmup_steps": 3},
        "checkpoint": {"every": 3},
    }
    return Recipe(**settings | changes)


def train(material: Path, out: Path, notes: list[str] | None = None, resume: bool = False, **changes):
    note = (lambda text: None) if notes is None else notes.append
    return train_critic(recipe_of(material, **changes), [material / "rollouts.jsonl"], out, note, resume=resume)


@pytest.fixture(scope="module")
def uninterrupted(material, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    train(material, out, checkpoint={"every": 0})
    return out


def assert_same(out: Path, expected: Path) -> None:
    for name in ("model.safetensors", "value_head.safetensors"):
        assert (out / "model" / name).read_bytes() == (expected / "model" / name).read_bytes(), name
    assert (out / METRICS).read_text() == (expected / METRICS).read_text()


def interrupt_after(step: int, number: int, monkeypatch) -> None:
    """As soon as its metrics are recorded."""
    log_metrics = RunFolder.log_metrics

    def interrupting(folder, done, metrics):
        log_metrics(folder, done, metrics)
        if done == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(RunFolder, "log_metrics", interrupting)


@pytest.mark.parametrize(("number", "end", "code"), [("SIGINT", KeyboardInterrupt, None), ("SIGTERM", SystemExit, 143)])
def test_a_signal_saves_and_the_training_goes_on_bitwise(
    material, uninterrupted, tmp_path, monkeypatch, number, end, code
):
    with monkeypatch.context() as patch:
        interrupt_after(5, getattr(signal, number), patch)
        with pytest.raises(end) as ended:
            train(material, tmp_path / "out")
    assert getattr(ended.value, "code", None) == code
    assert max(list_checkpoints(tmp_path / "out" / "checkpoints")) == 5
    assert not (tmp_path / "out" / "model").exists()
    notes: list[str] = []
    done = train(material, tmp_path / "out", notes, resume=True)
    assert any("resumed from" in note and "step-000005" in note for note in notes)
    assert_same(tmp_path / "out", uninterrupted)
    assert done.before == read_metrics(uninterrupted)[0]["val/explained_var"] != done.after


def _killed_in_the_second_checkpoint(material: Path, out: Path) -> None:
    save, calls = checkpoint.save_file, [0]

    def dying(*arguments):
        calls[0] += 1
        if calls[0] == 3:  # two files each
            os.kill(os.getpid(), signal.SIGKILL)
        return save(*arguments)

    checkpoint.save_file = dying
    train(material, out)


def test_a_killed_training_goes_on_bitwise(material, uninterrupted, tmp_path):
    killed = multiprocessing.get_context("fork").Process(
        target=_killed_in_the_second_checkpoint, args=(material, tmp_path / "out")
    )
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL and list(list_checkpoints(tmp_path / "out" / "checkpoints")) == [3]
    train(material, tmp_path / "out", resume=True)
    assert_same(tmp_path / "out", uninterrupted)


def test_what_a_resume_may_change_and_what_not(material, tmp_path):
    train(material, tmp_path / "out", critic={"lr": 3e-3, "epochs": 1})
    others = {
        "seed is 1, was 0": {"seed": 1},
        "samples_per_prompt is 8, was 16": {"rollout": {"prompts_per_step": 2, "samples_per_prompt": 4}},
        "critic.head is 'two-hot', was 'scalar'": {"critic": {"head": "two-hot", "value_range": (0.0, 1.0)}},
    }
    for message, changes in others.items():
        with pytest.raises(CheckpointError, match=message):
            train(material, tmp_path / "out", resume=True, **changes)
    notes: list[str] = []
    train(material, tmp_path / "out", notes, resume=True)
    assert any("critic.epochs 1 -> 2" in note for note in notes)
    assert [row["step"] for row in read_metrics(tmp_path / "out")] == list(range(9))


def test_a_model_that_could_not_be_written_is_written_by_a_resume(material, uninterrupted, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fastppo.critic_training.write_critic", full)
        with pytest.raises(TrainingError, match="No space left .* a resume .--resume. writes them"):
            train(material, tmp_path / "out")
    train(material, tmp_path / "out", resume=True)
    assert_same(tmp_path / "out", uninterrupted)


def test_the_command_says_how_to_go_on(material, tmp_path, capsys, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output_dir: {tmp_path / 'run'}\ndevice: cpu\nmodel: {{name: {material / 'base'}}}\n"
        "rollout: {prompts_per_step: 16, max_new_tokens: 6}\n"
    )
    words = ["critic", str(recipe), "learner.epochs=1", "--rollouts", str(material / "rollouts.jsonl")]
    with monkeypatch.context() as patch:
        interrupt_after(2, signal.SIGTERM, patch)
        assert cli.main(words) == 143
    error = capsys.readouterr().err
    assert f"step-000002; go on with: fastppo {' '.join(words)} --resume" in error
    assert cli.main([*words, "--resume"]) == 0
    assert "done: explained variance" in capsys.readouterr().out
