"""`torchrun -m fastppo train`: ranks that are killed are started again and go on by themselves, and signals end all of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastppo import cli
from fastppo.checkpoint import list_checkpoints
from fastppo.run_folder import read_history, read_metrics
from tests.distributed.ranks import run_ranks
from tests.tiny import make_model, make_tokenizer
from tests.tiny_trainer import PROMPTS

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
total_steps: 4
model: {name: ./model}
data: {path: ./prompts.jsonl}
reward: {timeout: null, functions: [{function: './count.py:count'}]}
rollout: {prompts_per_step: 8, max_new_tokens: 6}
learner: {num_minibatches: 2, epochs: 1}
optimizer: {lr: 1e-3}
critic: {lr: 1e-3}
checkpoint: {every: 1}
device: cpu
"""
# Counts the letter a. After its third call rank VICTIM kills itself, once, in the middle of the update; with SLOW each call takes its time.
REWARD = """
import os, signal, time
from fastppo.optimizer import Optimizer

calls, steps = 0, 0

def count(completions, **_):
    global calls
    calls += 1
    dies = os.environ["RANK"] == os.environ.get("VICTIM") and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    if dies and calls == 3:
        Optimizer.step = half_of_the_update(Optimizer.step)
    time.sleep(float(os.environ.get("SLOW", 0)))
    return [text.count("a") / max(1, len(text)) for text in completions]

def half_of_the_update(step):
    def steps_once(self, norm):
        global steps
        steps += 1
        step(self, norm) if steps == 1 else os.kill(os.getpid(), signal.SIGKILL)
    return steps_once
"""


def write_recipe_of_ranks(folder: Path) -> Path:
    """RECIPE, with all that it names."""
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    (folder / "count.py").write_text(REWARD)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    return write_recipe_of_ranks(tmp_path_factory.mktemp("recipe"))


def start(recipe: Path, run: Path, *options: str, **environment: str) -> subprocess.Popen:
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", *options, "-m", "fastppo", "train"]
    command = [sys.executable, *launch, str(recipe), f"output_dir={run}"]
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = list(list_checkpoints(run / "checkpoints").values())[-1]
    return load_file(newest / "policy.safetensors") | load_file(newest / "policy_optimizer.safetensors")


def unkilled(recipe: str, run: str) -> int:
    return cli.main(["train", recipe, f"output_dir={run}"])


def test_a_killed_rank_costs_no_more_than_the_step_in_hand(recipe, tmp_path):
    """Though it comes in the middle of an update, where nothing that is left is whole: checkpoint.every is 1. And the run then is, bit for bit, the
    one that nothing has happened to. Rank 0 is the one that records the run."""
    process = start(recipe, tmp_path / "run", "--max-restarts", "1", VICTIM="0")
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said
    assert "resumed from" in said and "step-000002" in said
    assert [row["step"] for row in read_history(tmp_path / "run")] == [0, 2]
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert run_ranks(2, unkilled, str(recipe), str(tmp_path / "whole")) == [0, 0]
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_signal_to_torchrun_ends_all_ranks_with_a_checkpoint(recipe, tmp_path):
    process = start(recipe, tmp_path / "run", SLOW="1.5")
    deadline, metrics = time.monotonic() + 300, tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=200)
    assert process.returncode != 0 and "fastppo: interrupted; the last checkpoint is" in said, said
    done = max(list_checkpoints(tmp_path / "run" / "checkpoints"))
    assert 1 <= done < 4 and read_metrics(tmp_path / "run")[-1]["step"] == done
