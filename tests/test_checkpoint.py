"""Checkpoints: whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from fastppo import checkpoint
from fastppo.checkpoint import (
    CheckpointError,
    flatten_optimizer,
    load_checkpoint,
    load_latest_checkpoint,
    restore_optimizer,
    save_checkpoint,
)


def save(root, step, keep=2, value=None):
    tensors = {
        "policy": {"w": torch.full((64, 64), float(step if value is None else value))},
        "critic": {"v": torch.arange(3)},
    }
    return save_checkpoint(root, step, tensors, {"note": f"step {step}"}, keep=keep)


def test_round_trip(tmp_path):
    tensors, state, step = load_checkpoint(save(tmp_path, 7))
    assert step == 7 and state == {"note": "step 7"}
    assert torch.equal(tensors["policy"]["w"], torch.full((64, 64), 7.0))
    assert tensors["critic"]["v"].dtype == torch.int64


def test_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 1_000_000):
        save(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003", "step-1000000"]
    assert load_latest_checkpoint(tmp_path)[0].name == "step-1000000"


def test_no_checkpoint(tmp_path):
    assert load_latest_checkpoint(tmp_path) is None and load_latest_checkpoint(tmp_path / "absent") is None


def test_damaged_later_checkpoints_push_no_whole_one_out(tmp_path):
    """Resumed from step 1 because 5 and 6 are damaged: what is saved next stays, however few are kept."""
    for step in (1, 5, 6):
        flip(save(tmp_path, step, keep=9) / "state.json")
    save(tmp_path, 2, keep=1)
    with pytest.warns(UserWarning, match="step-000005"), pytest.warns(UserWarning, match="step-000006"):
        assert load_latest_checkpoint(tmp_path)[0].name == "step-000002"


def test_state_may_hold_any_key(tmp_path):
    assert load_checkpoint(save_checkpoint(tmp_path, 7, {}, {"step": 99}, keep=1))[1:] == ({"step": 99}, 7)


@pytest.mark.parametrize("end", [SystemExit("a kill"), OSError(errno.ENOSPC, "No space left on device")])
def test_replacing_a_checkpoint_keeps_the_old_one_until_the_new_is_there(tmp_path, monkeypatch, end):
    save(tmp_path, 1, keep=1, value=1)
    rename = Path.rename

    def fail(path, target):
        if path.name.startswith(checkpoint._TEMPORARY):
            raise end
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises((SystemExit, CheckpointError)):
        save(tmp_path, 1, keep=1, value=2)
    monkeypatch.undo()
    assert (load_latest_checkpoint(tmp_path)[1][0]["policy"]["w"] == 1).all()
    save(tmp_path, 1, keep=1, value=3)
    assert (load_latest_checkpoint(tmp_path)[1][0]["policy"]["w"] == 3).all()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"], "nothing is left over"


def test_state_that_json_cannot_hold_is_not_called_a_full_disk(tmp_path):
    with pytest.raises(CheckpointError, match="not JSON serializable") as error:
        save_checkpoint(tmp_path, 1, {}, {"x": {1}}, keep=1)
    assert "free some space" not in str(error.value)


def test_tied_and_strided_tensors(tmp_path):
    weight = torch.randn(4, 6)
    path = save_checkpoint(tmp_path, 1, {"m": {"a": weight, "b": weight, "c": weight.T, "d": weight[1]}}, {}, keep=1)
    tensors = load_checkpoint(path)[0]["m"]
    for name, expected in {"a": weight, "b": weight, "c": weight.T, "d": weight[1]}.items():
        assert torch.equal(tensors[name], expected)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["policy.safetensors", "state.json", "critic.safetensors"])
@pytest.mark.parametrize("damage", [flip, truncate, os.remove])
def test_damage_is_noticed_and_named(tmp_path, name, damage):
    save(tmp_path, 1)
    damaged = save(tmp_path, 2)
    damage(damaged / name)
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(damaged)
    with pytest.warns(UserWarning, match="step-000002.*; using step-000001"):
        assert load_latest_checkpoint(tmp_path)[0].name == "step-000001"


def test_a_lost_manifest_is_noticed(tmp_path):
    path = save(tmp_path, 1)
    (path / checkpoint.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="manifest"):
        load_checkpoint(path)
    for text in ("[]", "{}", "{"):
        (path / checkpoint.MANIFEST).write_text(text)
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_checkpoint(path)


@pytest.mark.parametrize("function", ["save_file", "_flush", "fingerprint"])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, function):
    save(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, function, full)
    with pytest.raises(CheckpointError, match="step-000002.*No space left"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    load_latest_checkpoint(tmp_path)


def test_a_real_limit_on_file_size_loses_nothing(tmp_path):
    """The kernel refuses the write half-way, as a full disk does."""
    script = (
        "import resource, signal, sys, torch\n"
        "from fastppo.checkpoint import save_checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "save_checkpoint(sys.argv[1], 1, {'m': {'w': torch.ones(10)}}, {}, keep=2)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "save_checkpoint(sys.argv[1], 2, {'m': {'w': torch.ones(100000)}}, {}, keep=2)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and "CheckpointError" in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


KILLS = """
import os, random, signal, sys, time, torch
from fastppo.checkpoint import load_latest_checkpoint, save_checkpoint

torch.set_num_threads(1)  # a pool of threads would not survive the fork
root, rng, reached = sys.argv[1], random.Random(0), 0
for kill in range(30):
    victim = os.fork()
    if not victim:
        step = reached
        while True:
            step += 1
            same = step - step % 2  # every other save replaces the one before it
            save_checkpoint(root, same, {"m": {"w": torch.full((200, 200), float(step))}}, {"step": step}, keep=2)
    time.sleep(0.02 + rng.random() / 10)
    os.kill(victim, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(victim, 0)[1]), "the victim failed by itself"
    newest = load_latest_checkpoint(root)
    if newest is not None:
        tensors, state, step = newest[1]
        assert (tensors["m"]["w"] == state["step"]).all() and step == state["step"] - state["step"] % 2
        assert state["step"] >= reached, (state, reached)
        reached = state["step"]
print(reached)
"""


def test_killed_at_any_moment(tmp_path):
    """A process that saves without end is killed at random moments: what was saved before is there, and it is whole."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", KILLS, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30, "checkpoints were written between the kills"


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / ".writing-000005").mkdir(parents=True)
    save(tmp_path, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000006"]


def make_optimizer():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def steps(model, optimizer, count):
    for i in range(count):
        (model(torch.ones(1, 3) * (i + 1)) ** 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_optimizer_continues_bitwise(tmp_path):
    model, optimizer = make_optimizer()
    steps(model, optimizer, 3)
    tensors, state = flatten_optimizer(optimizer, dict(model.named_parameters()))
    path = save_checkpoint(tmp_path, 1, {"o": tensors, "m": model.state_dict()}, {"o": state}, keep=1)
    loaded, state, _ = load_checkpoint(path)
    other, fresh = make_optimizer()
    other.load_state_dict(loaded["m"])
    restore_optimizer(fresh, dict(other.named_parameters()), loaded["o"], state["o"])
    steps(model, optimizer, 3)
    steps(other, fresh, 3)
    assert torch.equal(model.weight, other.weight) and torch.equal(model.bias, other.bias)
    moments = fresh.state[other.weight]["exp_avg"]
    restore_optimizer(fresh, dict(other.named_parameters()), loaded["o"], state["o"])
    assert fresh.state[other.weight]["exp_avg"].data_ptr() not in (
        moments.data_ptr(),
        loaded["o"]["exp_avg/weight"].data_ptr(),
    )


def test_optimizer_of_another_model_is_refused():
    model, optimizer = make_optimizer()
    steps(model, optimizer, 1)
    tensors, state = flatten_optimizer(optimizer, dict(model.named_parameters()))
    with pytest.raises(CheckpointError, match="other parameters"):
        restore_optimizer(optimizer, {"w": model.weight}, tensors, state)
    named = dict(model.named_parameters())
    with pytest.raises(CheckpointError, match="other tensors.*exp_avg_sq/bias"):
        restore_optimizer(optimizer, named, {k: v for k, v in tensors.items() if k != "exp_avg_sq/bias"}, state)
    with pytest.raises(CheckpointError, match="shape"):
        restore_optimizer(optimizer, named, {**tensors, "exp_avg_sq/weight": torch.ones(9)}, state)
    assert all(len(optimizer.state[parameter]) == 3 for parameter in named.values()), "a refusal changes nothing"
    with pytest.raises(ValueError, match=r"named lacks.*\[2\]"):
        flatten_optimizer(optimizer, {"weight": model.weight})
    other = nn.Linear(4, 2)
    with pytest.raises(CheckpointError, match="shape"):
        restore_optimizer(torch.optim.AdamW(other.parameters()), dict(other.named_parameters()), tensors, state)


@pytest.mark.parametrize("name", ["policy.safetensors", "critic.safetensors", "state.json"])
def test_a_manifest_that_lacks_an_entry_is_damaged(tmp_path, name):
    path = save(tmp_path, 1)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    del manifest[name]
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(path)


def test_when_all_are_damaged_nothing_is_taken_for_a_fresh_start(tmp_path):
    for step in (1, 2):
        flip(save(tmp_path, step) / "state.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a checkpoint that is used in the place of another, where there is none
        with pytest.raises(CheckpointError, match="no checkpoint in .*step-000002.*step-000001"):
            load_latest_checkpoint(tmp_path)


def refuse(*arguments, **keywords):
    raise OSError(errno.EBUSY, "Device or resource busy")


def refuse_folders(path):
    if path.is_dir():
        raise OSError(errno.EINVAL, "Invalid argument")


@pytest.mark.parametrize(
    ("owner", "name", "replacement", "message"),
    [(checkpoint.shutil, "rmtree", refuse, "cannot be removed"), (checkpoint, "_flush", refuse_folders, "flushed")],
)
def test_what_goes_wrong_beside_a_complete_checkpoint_is_a_warning(
    tmp_path, monkeypatch, owner, name, replacement, message
):
    """An old one that cannot be removed (NFS), a file system that flushes no folders."""
    save(tmp_path, 1, keep=1)
    (tmp_path / ".writing-000002").mkdir()
    monkeypatch.setattr(owner, name, replacement)
    with pytest.warns(UserWarning, match=message):
        save(tmp_path, 2, keep=1)
    assert load_latest_checkpoint(tmp_path)[1][2] == 2
