"""A run that is killed goes on, bit for bit, as if it had not been."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastppo.errors import CheckpointError
from fastppo.run_folder import read_metrics, read_settings
from tests.fresh import context
from tests.tiny import make_model
from tests.tiny_trainer import build_trainer, count_a


def _train(output: Path, resume: bool, die: tuple[str, str, int] | None) -> None:
    """In a process of its own: `die` names a function of a module, by whose n-th call the process is killed with SIGKILL."""
    torch.set_num_threads(1)
    if die is not None:
        module, name, nth = die
        owner = importlib.import_module(module)
        original, calls = getattr(owner, name), count(1)

        def dying(*args, **kwargs):
            if next(calls) == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, dying)
    settings = {"total_steps": 4, "checkpoint__every": 1, "reward__kl_coef": 0.05, "evaluation__every": 2}
    build_trainer(output, eval_prompts=["ab"], learner__epochs=2, **settings).train(resume=resume)


def run(output: Path, *, resume: bool = False, die: tuple[str, str, int] | None = None) -> int:
    process = context.Process(target=_train, args=(output, resume, die))
    process.start()
    process.join(300)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    assert run(output) == 0
    return output


KILLS = {
    "middle of the update of step 3": ("fastppo.algorithms.ppo", "ppo_loss", 10),
    "middle of the rollout scoring of step 2": ("fastppo.algorithms.advantages", "gae", 2),
    "first write of a checkpoint": ("fastppo.checkpoint", "save_file", 1),
    "middle of a later checkpoint": ("fastppo.checkpoint", "save_file", 7),
    "between a checkpoint's rename and the clean-up": ("shutil", "rmtree", 1),
}


@pytest.mark.parametrize("when", KILLS)
def test_a_killed_run_continues_bitwise(uninterrupted, tmp_path, when):
    output = tmp_path / "run"
    assert run(output, die=KILLS[when]) == -signal.SIGKILL, "the run was to be killed there"
    assert run(output, resume=True) == 0
    expected = load_file(uninterrupted / "model" / "model.safetensors")
    found = load_file(output / "model" / "model.safetensors")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert [stable(row) for row in read_metrics(output)] == [stable(row) for row in read_metrics(uninterrupted)]


def stable(row: dict) -> dict:
    """A metrics row without what a clock or the process's memory decides."""
    return {name: value for name, value in row.items() if not name.startswith(("time/", "perf/"))}


def test_resume_without_a_checkpoint_starts_anew(make_trainer, tmp_path):
    make_trainer(total_steps=1).train(resume=True)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1]


def test_records_without_a_checkpoint_are_kept(make_trainer, tmp_path):
    """As a kill before the first checkpoint leaves them, or a user who removed the checkpoints to save space."""
    folder, names = tmp_path / "run", ("config.yaml", "history.jsonl", "metrics.jsonl", "samples.jsonl")
    for number in (1, 2):
        make_trainer(total_steps=number).train(resume=True)
        shutil.rmtree(folder / "checkpoints")
        before = [(folder / name).read_bytes() for name in names]
        make_trainer(total_steps=1).train(resume=True)
        assert [(folder / f"earlier-{number}" / name).read_bytes() for name in names] == before
        shutil.rmtree(folder / "checkpoints")
        shutil.rmtree(folder / f"earlier-{number + 1}", ignore_errors=True)
        (folder / "metrics.jsonl").unlink()
    assert not (folder / "earlier-3").exists()


def test_records_beside_damaged_checkpoints_are_left_alone(make_trainer, tmp_path):
    make_trainer(total_steps=2, checkpoint__every=1).train()
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        (path / "state.json").write_text("")
    before = records(tmp_path / "run")
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be used"):
        make_trainer(total_steps=3).train(resume=True)
    assert records(tmp_path / "run") == before


def records(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


OTHERS = {
    "model.dtype is 'bfloat16', was 'float32'": lambda: {"model": make_model().bfloat16()},
    "critic.kind is 'shared', was 'separate'": lambda: {"critic__kind": "shared"},
    "reward.kl_coef is 'above 0', was '0'": lambda: {"reward__kl_coef": 0.1},
    "seed is 1, was 0": lambda: {"seed": 1},
    "number of prompts is 2, was 8": lambda: {"prompts": ["ab", "c"]},
    "model.hidden_size is 16, was 32": lambda: {"model": make_model(hidden_size=16)},
    "model.num_hidden_layers is 1, was 2": lambda: {"model": make_model(num_hidden_layers=1)},
    "rope_theta is 500.0, was 10000.0": lambda: {
        "model": make_model(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    },
}


@pytest.mark.parametrize("message", OTHERS)
def test_what_may_not_change_is_refused_by_name_before_anything_is_written(make_trainer, tmp_path, message):
    make_trainer(total_steps=1).train()
    before = records(tmp_path / "run")
    with pytest.raises(CheckpointError, match=re.escape(message)):
        make_trainer(total_steps=2, **OTHERS[message]()).train(resume=True)
    assert records(tmp_path / "run") == before


def test_the_reference_may_not_go(make_trainer, tmp_path):
    make_trainer(total_steps=1, reward__kl_coef=0.1).train()
    with pytest.raises(CheckpointError, match=re.escape("reward.kl_coef is '0', was 'above 0'")):
        make_trainer(total_steps=2).train(resume=True)


def test_what_may_change_is_said_and_recorded(make_trainer, tmp_path):
    make_trainer(total_steps=1).train()
    trainer = make_trainer(
        total_steps=2, optimizer__lr=0.5, prompts=["ab", "cde", "f", "ghijk", "lm", "nop", "ba", "a"]
    )
    notes = []
    trainer.reporter.note = notes.append
    trainer.train(resume=True)
    assert "optimizer.lr 0.001 -> 0.5" in notes[0] and "total_steps 1 -> 2" in notes[0] and "other prompts" in notes[0]
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [(row["step"], row["settings"]["optimizer"]["lr"]) for row in history] == [(0, 0.001), (1, 0.5)]


@pytest.mark.parametrize(
    "damage", [b"", b"\0\0", b"{", b"# Settings of a fastppo run\n", b"# Settings of a fastppo run\n\xff["]
)
@pytest.mark.parametrize("history", [True, False])
def test_a_damaged_config_beside_good_checkpoints_refuses_nothing(make_trainer, tmp_path, damage, history):
    make_trainer(total_steps=1).train()
    (tmp_path / "run" / "config.yaml").write_bytes(damage)
    if not history:
        (tmp_path / "run" / "history.jsonl").write_bytes(damage)
    make_trainer(total_steps=2).train(resume=True)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2]
    assert read_settings(tmp_path / "run")["total_steps"] == 2


def test_a_run_keeps_others_out_of_its_folder(make_trainer, tmp_path):
    """Also a resume, which would remove the checkpoint that is being written."""
    refused = []

    def reward(prompts, completions, **_):
        for resume in (False, True):
            with pytest.raises(ValueError, match="in use"):
                make_trainer(total_steps=2).train(resume=resume)
            refused.append(resume)
        return count_a(prompts, completions)

    make_trainer(reward, total_steps=1).train()
    assert refused == [False, True]


def test_resume_refuses_another_reference(make_trainer):
    make_trainer(total_steps=1, reward__kl_coef=0.1).train()
    other = make_trainer(model=make_model(seed=5), total_steps=2, reward__kl_coef=0.1)
    with pytest.raises(CheckpointError, match="another reference"):
        other.train(resume=True)


def test_a_resumed_run_can_be_lengthened(make_trainer, tmp_path):
    make_trainer(total_steps=1).train()
    make_trainer(total_steps=3).train(resume=True)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3]


def test_a_corrupted_checkpoint_falls_back_to_the_one_before(make_trainer, tmp_path):
    make_trainer(total_steps=2, checkpoint__every=1).train()
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1]
    weights = newest / "policy.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    trainer = make_trainer(total_steps=3)
    with pytest.warns(UserWarning, match=newest.name):
        trainer.train(resume=True)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3]
