"""Checkpoints that ranks write together: whole at any moment, and the same bits for any number of ranks."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastppo.checkpoint import list_checkpoints, load_checkpoint, load_latest_checkpoint, save_checkpoint
from fastppo.errors import CheckpointError
from fastppo.sharded_checkpoint import ShardedCheckpoints
from fastppo.stored_shards import StoredShards
from tests.distributed.ranks import SECONDS, RankFailed, run_ranks
from tests.distributed.sharded import Networks, in_world


def _save(root: Path, networks: Networks, step: int, keep: int = 2) -> None:
    writer = ShardedCheckpoints(SECONDS)
    writer.save(root, step, *networks.learner.state_dict(), keep=keep)
    networks.learn(1)  # while it is being written
    assert writer.wait() == root / f"step-{step:06d}"
    writer.close()


def _trained(root: Path, kind: str) -> dict[str, Tensor]:
    """Weights and moments as they were when they were saved."""
    networks = Networks(kind, sharded=True)
    networks.learn(1)
    before = networks.weights()
    _save(root, networks, 1)
    return before


def _resumed(root: Path, kind: str, again: Path | None, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What a checkpoint gives back to as many ranks as there are; saved `again` by these."""
    networks = Networks(kind, sharded=True, dtype=dtype)
    tensors, state, _ = load_checkpoint(root / "step-000001")
    networks.learner.load_state_dict(tensors, state)
    found = networks.weights()
    if again is not None:
        _save(again, networks, 1)
    return found


def _equal(ours: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert ours.keys() == other.keys()
    assert all(torch.equal(ours[name], other[name]) for name in other)


def _trained_of_all(root: Path, kinds: list[str]) -> dict[str, dict[str, Tensor]]:
    return {kind: _trained(root / kind, kind) for kind in kinds}


def _resumed_of_all(root: Path, again: Path, kinds: list[str]) -> dict[str, dict[str, Tensor]]:
    return {kind: _resumed(root / kind, kind, again / kind) for kind in kinds}


def test_four_ranks_save_and_two_and_one_go_on_with_the_same_bits(tmp_path: Path) -> None:
    kinds = ["separate", "shared"] + ["lora"] * bool(importlib.util.find_spec("peft"))
    four, two, one = tmp_path / "four", tmp_path / "two", tmp_path / "one"
    before = run_ranks(4, in_world, _trained_of_all, four, kinds)[0]
    by_two = run_ranks(2, in_world, _resumed_of_all, four, two, kinds)[0]
    by_one = run_ranks(1, in_world, _resumed_of_all, two, one, kinds)[0]
    for kind in kinds:
        assert any(name.startswith("policy_optimizer/exp_avg/") and x.any() for name, x in before[kind].items())
        _equal(by_two[kind], before[kind])
        _equal(by_one[kind], before[kind])
        alone = Networks(kind, sharded=False)
        tensors, state, _ = load_checkpoint(one / kind / "step-000001")
        assert isinstance(tensors, StoredShards)
        alone.learner.load_state_dict(tensors, state)
        _equal(alone.weights(), before[kind])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_on_whole_weights_goes_on_sharded_and_back(tmp_path: Path, dtype: torch.dtype) -> None:
    """The masters of bfloat16 weights are what a sharded run holds, and what comes back."""
    alone = Networks("separate", sharded=False, dtype=dtype)
    alone.learn(1)
    before = alone.weights()
    save_checkpoint(tmp_path / "alone", 1, *alone.learner.state_dict(), keep=1)
    found = run_ranks(2, in_world, _resumed, tmp_path / "alone", "separate", tmp_path / "two", dtype)[0]
    masters = {name.replace("_masters/", "/"): x for name, x in before.items() if "_masters/" in name}
    _equal(found, {name: x for name, x in before.items() if "_masters/" not in name} | masters)
    back = Networks("separate", sharded=False, dtype=dtype)
    tensors, state, _ = load_checkpoint(tmp_path / "two" / "step-000001")
    back.learner.load_state_dict(tensors, state)
    _equal(back.weights(), before)


def _saved_three_times(root: Path) -> None:
    writer, ones = ShardedCheckpoints(SECONDS), {"policy": {"w": torch.ones(1000)}}
    for step in (1, 2, 3):
        writer.save(root, step, ones, {"step": step}, keep=2)
    writer.wait()
    with pytest.raises(CheckpointError, match=r"step-000004 could not be written.*no JSON|not JSON serializable"):
        writer.save(root, 4, ones, {"odd": {1, 2}}, keep=2)
        writer.wait()
    assert writer.wait() is None
    writer.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    run_ranks(2, in_world, _saved_three_times, root)
    return root


def test_older_checkpoints_go_and_a_failure_is_told_to_every_rank_and_leaves_nothing(saved: Path) -> None:
    assert list(list_checkpoints(saved)) == [2, 3]
    assert sorted(path.name for path in saved.iterdir()) == ["step-000002", "step-000003"]


def _saving_until_killed(root: Path, seconds: float) -> None:
    writer = ShardedCheckpoints(SECONDS)
    for step in range(1, 10**6):
        writer.save(root, step, {"policy": {"w": torch.full((50_000,), float(step))}}, {"step": step}, keep=2)
        if step == 3:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def test_ranks_that_are_killed_while_they_write_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="the process has ended"):
        run_ranks(2, in_world, _saving_until_killed, tmp_path, 0.05)
    _, (tensors, state, step) = load_latest_checkpoint(tmp_path)
    assert step == state["step"] > 1 and torch.equal(tensors["policy"]["w"], torch.full((50_000,), float(step)))


def test_a_damaged_part_is_found_and_the_checkpoint_before_is_used(saved: Path, tmp_path: Path) -> None:
    root = shutil.copytree(saved, tmp_path / "damaged")
    part = next((root / "step-000003" / "shards").glob("__0_*.distcp"))
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=rf"shards/{part.name} is not what was written"):
        load_checkpoint(root / "step-000003")
    with pytest.warns(UserWarning, match="is damaged"):
        path, (tensors, _, step) = load_latest_checkpoint(root)
    assert path.name == "step-000002" and step == 2 and torch.equal(tensors["policy"]["w"], torch.ones(1000))
