"""A run that is killed goes on, bit for bit, as if it had not been."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastppo.run_folder import read_metrics

ROOT = Path(__file__).resolve().parents[2]

# Runs `train(resume)` in a process of its own; `die` names a function of a module that is killed with SIGKILL at its n-th call.
SCRIPT = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from fastppo import PPOTrainer
from fastppo.console import Reporter
from tests.tiny import make_model, make_tokenizer
from tests.trainer.conftest import PROMPTS, count_a, tiny_config

output, resume, module, name, nth = sys.argv[1], sys.argv[2] == "1", *sys.argv[3:5], int(sys.argv[5])
if nth:
    import importlib
    owner = importlib.import_module(module)
    original, calls = getattr(owner, name), [0]
    def dying(*args, **kwargs):
        calls[0] += 1
        if calls[0] == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(owner, name, dying)
config = tiny_config(output, total_steps=4, checkpoint__every=1, reward__kl_coef=0.05, evaluation__every=2, learner__epochs=2)
trainer = PPOTrainer(make_model(), reward=count_a, prompts=PROMPTS, eval_prompts=["ab"], config=config,
                     tokenizer=make_tokenizer(), reporter=Reporter(4, quiet=True))
trainer.train(resume=resume)
"""


def run(output: Path, *, resume: bool = False, die: tuple[str, str, int] = ("", "", 0)) -> int:
    command = [sys.executable, "-c", SCRIPT, str(output), str(int(resume)), *map(str, die)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    assert run(output) == 0
    return output


KILLS = {
    "middle of the update of step 3": ("fastppo.algorithms.ppo", "ppo_loss", 10),
    "middle of the rollout scoring of step 2": ("fastppo.algorithms.ppo", "gae", 2),
    "first write of a checkpoint": ("fastppo.checkpoint", "save_file", 1),
    "middle of a later checkpoint": ("fastppo.checkpoint", "save_file", 7),
    "between a checkpoint's rename and the clean-up": ("shutil", "rmtree", 1),
}


@pytest.mark.slow
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


def test_resume_refuses_another_reference(make_trainer):
    from fastppo.checkpoint import CheckpointError
    from tests.tiny import make_model

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
