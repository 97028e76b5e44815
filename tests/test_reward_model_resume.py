"""A reward model's training that is interrupted or killed goes on from its checkpoint, on a CPU to the same bits."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from fastppo import cli, reward_model_checkpoints
from fastppo.errors import CheckpointError
from fastppo.reward_model_config import RewardModelRecipe
from fastppo.reward_model_training import train_reward_model
from fastppo.rewards import RewardModel
from tests.test_reward_model_training import preferences
from tests.tiny import make_model, make_tokenizer

pytest.importorskip("trl", reason="TRL is not installed")
pytestmark = pytest.mark.usefixtures("plain_signal_handlers")

STEPS = 8  # two passes over 16 pairs, four of them a step
TRAINING = {"epochs": 2, "lr": 3e-3, "batch_size": 4, "microbatch_size": 2, "max_length": 32, "warmup_steps": 2}


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """A folder with a language model, `base`, and 26 pairs, of which ten are held out."""
    folder = tmp_path_factory.mktemp("material")
    make_model().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preferences(26, seed=0)))
    return folder


def recipe_of(material: Path, output_dir: Path, every: int = 3, seed: int = 0, **training) -> RewardModelRecipe:
    return RewardModelRecipe(
        output_dir=str(output_dir),
        seed=seed,
        device="cpu",
        model={"name": str(material / "base")},
        data={"path": str(material / "pairs.jsonl"), "eval_size": 10},
        training=TRAINING | training,
        checkpoint={"every": every, "keep": 2},
    )


def silent(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def uninterrupted(material, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "rm"
    train_reward_model(recipe_of(material, folder, every=0), silent)
    return folder


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir())


def assert_same(folder: Path, expected: Path) -> None:
    for name in ("model/model.safetensors", "metrics.json"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.parametrize(("number", "end", "code"), [("SIGINT", KeyboardInterrupt, None), ("SIGTERM", SystemExit, 143)])
def test_a_signal_saves_the_step_in_hand_and_the_training_goes_on_bitwise(
    material, uninterrupted, tmp_path, number, end, code
):
    """It comes while the first step is logged: the second is finished and saved."""
    recipe, notes = recipe_of(material, tmp_path / "rm"), []

    def interrupting(text):
        if text.startswith("step 1 of"):
            os.kill(os.getpid(), getattr(signal, number))

    with pytest.raises(end) as ended:
        train_reward_model(recipe, interrupting)
    assert getattr(ended.value, "code", None) == code
    assert checkpoints(tmp_path / "rm") == ["checkpoint-2"] and not (tmp_path / "rm" / "model").exists()
    train_reward_model(recipe, notes.append, resume=True)
    assert notes[0].startswith("resumed from ") and "checkpoint-2" in notes[0]
    assert checkpoints(tmp_path / "rm") == ["checkpoint-6", "checkpoint-8"], "the newest two of 2, 3, 6 and 8"
    assert_same(tmp_path / "rm", uninterrupted)


def test_a_signal_while_the_finished_model_is_judged_costs_nothing_but_that(
    material, uninterrupted, tmp_path, monkeypatch
):
    recipe = recipe_of(material, tmp_path / "rm")

    class Interrupting(RewardModel):
        def __call__(self, *arguments, **others):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("fastppo.reward_model_training.RewardModel", Interrupting)
        with pytest.raises(SystemExit) as ended:
            train_reward_model(recipe, silent)
    assert ended.value.code == 143 and checkpoints(tmp_path / "rm")[-1] == f"checkpoint-{STEPS}"
    train_reward_model(recipe, silent, resume=True)
    assert_same(tmp_path / "rm", uninterrupted)


def _killed_at_the_second_seal(recipe: RewardModelRecipe) -> None:
    fingerprint = reward_model_checkpoints.fingerprint

    def dying(path):
        if "checkpoint-6" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        return fingerprint(path)

    reward_model_checkpoints.fingerprint = dying
    train_reward_model(recipe, silent)


def test_a_training_killed_while_it_saves_goes_on_from_the_checkpoint_before_bitwise(material, uninterrupted, tmp_path):
    recipe, notes = recipe_of(material, tmp_path / "rm"), []
    process = multiprocessing.get_context("fork").Process(target=_killed_at_the_second_seal, args=(recipe,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and checkpoints(tmp_path / "rm") == ["checkpoint-3", "checkpoint-6"]
    with pytest.raises(ValueError, match="holds a run already: resume it"):
        train_reward_model(recipe, silent)
    train_reward_model(recipe, notes.append, resume=True)
    assert "checkpoint-3" in notes[0]
    assert_same(tmp_path / "rm", uninterrupted)


def test_what_a_resume_may_change_and_what_not(material, tmp_path):
    folder, notes = tmp_path / "rm", []
    train_reward_model(recipe_of(material, folder, epochs=1), silent)
    for change, message in (({"lr": 1e-3}, "training.lr is 0.001, was 0.003"), ({"seed": 1}, "seed is 1, was 0")):
        with pytest.raises(CheckpointError, match=message):
            train_reward_model(recipe_of(material, folder, **change), silent, resume=True)
    train_reward_model(recipe_of(material, folder), notes.append, resume=True)
    assert "with changes: training.epochs 1 -> 2" in notes[0]
    assert checkpoints(folder)[-1] == f"checkpoint-{STEPS}"
    newest = folder / "checkpoints" / f"checkpoint-{STEPS}" / "optimizer.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="optimizer.pt is not what was written; using the one before it"):
        train_reward_model(recipe_of(material, folder), notes.append, resume=True)
    assert checkpoints(folder)[-1] == f"checkpoint-{STEPS}"


def test_the_command_says_how_to_go_on(material, tmp_path, capsys, monkeypatch):
    """The hint is the same command with --resume, which ends with the line of a training that was not interrupted."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output_dir: {tmp_path / 'rm'}\ndevice: cpu\nmodel: {{name: {material / 'base'}}}\n"
        f"data: {{path: {material / 'pairs.jsonl'}, eval_size: 10}}\n"
        "training: {batch_size: 4, microbatch_size: 4, max_length: 32}\n"
    )
    words = ["reward-model", str(recipe), "epochs=1", "checkpoint.every=1"]
    seal = reward_model_checkpoints.SealedCheckpoints.seal

    def interrupting(checkpoints, step):
        seal(checkpoints, step)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(reward_model_checkpoints.SealedCheckpoints, "seal", interrupting)
        assert cli.main(words) == 143
    hint = f"checkpoint-2; go on with: fastppo {' '.join(words)} --resume"
    assert hint in capsys.readouterr().err
    assert cli.main([*words, "--resume"]) == 0
    assert "done: accuracy" in capsys.readouterr().out and checkpoints(tmp_path / "rm")[-1] == "checkpoint-4"
