"""Whole runs whose weights are divided among ranks: what they learn, what they write, and who goes on from it."""

from __future__ import annotations

import os
import shutil
import signal
import traceback
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fastppo import PPOTrainer
from fastppo.callbacks import Callback
from fastppo.checkpoint import list_checkpoints, load_checkpoint
from fastppo.export import export_run
from fastppo.run_folder import read_metrics
from fastppo.stored_shards import StoredShards
from tests.distributed.ranks import RankFailed, run_ranks
from tests.distributed.test_same_as_one import OF_THE_MACHINE
from tests.tiny import make_model, make_tokenizer
from tests.tiny_trainer import build_trainer
from tests.tolerance import assert_same_on_ranks

# With one prompt some ranks have nothing to sample or to learn from.
ONE_PROMPT = {"rollout__prompts_per_step": 1, "rollout__samples_per_prompt": 3}
RUNS: dict[str, dict[str, Any]] = {
    "separate": {"reward__kl_coef": 0.05, "evaluation__every": 1, "evaluation__keep_best": True},
    "shared": {"critic__kind": "shared", "learner__gradient_checkpointing": True} | ONE_PROMPT,
    "lora": {"lora__r": 2, "lora__alpha": 4.0, "reward__kl_coef": 0.05},
    "trpo": {"algorithm": "trpo", "learner__tokens_per_microbatch": 24, "trpo__cg_iterations": 4},
    "expert": {
        "algorithm": "expert_iteration",
        "search__kind": "best-of-n",
        "rollout__samples_per_prompt": 3,
        "reward__solved_score": 0.01,
    },
    "trpo on adapters": {"algorithm": "trpo", "critic__kind": "shared", "lora__r": 2, "lora__alpha": 4.0} | ONE_PROMPT,
}

THREE_STEPS = {"distributed__sharding": "full", "checkpoint__every": 1, "total_steps": 3}


class ReadsCheckpoints(Callback):
    """A checkpoint that a callback hears of is whole, also where it is written in the background."""

    def on_checkpoint(self, trainer: PPOTrainer, path: Path) -> None:
        assert load_checkpoint(path)[2] == trainer.step


def _trained(folder: Path, kind: str, steps: int, sharded: bool, resume: bool = False) -> dict[str, float]:
    """Rates are such that a step moves the weights by far more than sums in another order do."""
    model = make_model()
    start = folder.with_name("start")
    if not start.exists() and not sharded:
        model.save_pretrained(start)
        make_tokenizer().save_pretrained(start)
    model.name_or_path = str(start)
    settings = RUNS[kind] | ({"distributed__sharding": "full"} if sharded else {})
    eval_prompts = ["ab", "cd", "e"] if "evaluation__every" in settings else None
    settings |= {"optimizer__eps": 1e-3, "checkpoint__every": 1, "total_steps": steps}
    callbacks = [ReadsCheckpoints()] if kind == "shared" else []
    trainer = build_trainer(folder, model=model, eval_prompts=eval_prompts, callbacks=callbacks, **settings)
    return trainer.train(resume=resume)


def _model(folder: Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def _same_metrics(ours: Path, other: Path) -> None:
    for mine, theirs in zip(read_metrics(ours), read_metrics(other), strict=True):
        names = [name for name, value in theirs.items() if value is not None and not name.startswith(OF_THE_MACHINE)]
        for name in names:
            found, expected = (torch.tensor(row[name], dtype=torch.float64) for row in (mine, theirs))
            assert_same_on_ranks(found, expected, f"step {theirs['step']}, {name}")


def _trained_of_all(root: Path, name: str, steps: int, sharded: bool, resume: bool = False) -> dict[str, str]:
    """What each kind's run raised, "" where nothing; in one set of processes, which take longer to start than a run takes."""
    raised = dict.fromkeys(RUNS, "")
    for kind in RUNS:
        try:
            _trained(root / kind / name, kind, steps, sharded, resume)
        except Exception:
            raised[kind] = traceback.format_exc()
    return raised


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """(folder, kind -> what was raised): of each kind a run `alone` and one of `two` ranks, from whose checkpoint `four` and `one` go on."""
    root = tmp_path_factory.mktemp("runs")
    for kind in RUNS:
        (root / kind).mkdir()
    raised = run_ranks(1, _trained_of_all, root, "alone", 2, False)
    raised += run_ranks(2, _trained_of_all, root, "two", 2, True)
    for kind, later in product(RUNS, ("four", "one")):
        if (root / kind / "two").exists():
            shutil.copytree(root / kind / "two", root / kind / later)
    raised += run_ranks(4, _trained_of_all, root, "four", 3, True, True)
    raised += run_ranks(1, _trained_of_all, root, "one", 3, False, True)
    return root, {kind: "\n".join(filter(None, (each[kind] for each in raised))) for kind in RUNS}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_a_sharded_run_learns_and_writes_what_one_process_does(
    runs: tuple[Path, dict[str, str]], tmp_path: Path, kind: str
) -> None:
    """Two ranks; then four, and one process with whole weights, go on from their checkpoint."""
    if "lora__r" in RUNS[kind]:
        pytest.importorskip("peft")
    folder, raised = runs[0] / kind, runs[1][kind]
    assert not raised, raised
    alone, two, four, one = (folder / name for name in ("alone", "two", "four", "one"))
    _same_metrics(two, alone)
    written, expected = _model(two / "model"), _model(alone / "model")
    for name, weight in expected.items():
        assert_same_on_ranks(written[name], weight, name)
    assert any(not torch.equal(weight, make_model().state_dict()[name]) for name, weight in expected.items())
    assert isinstance(load_checkpoint(list_checkpoints(two / "checkpoints")[2])[0], StoredShards)
    exported = _model(export_run(two, tmp_path / "exported"))
    assert all(torch.equal(exported[name], weight) for name, weight in written.items())
    if kind == "separate":
        assert _model(two / "best").keys() == written.keys()
    if kind == "lora":
        assert (two / "adapter" / "adapter_model.safetensors").is_file()
    _same_metrics(four, one)
    for name, weight in _model(one / "model").items():
        assert_same_on_ranks(_model(four / "model")[name], weight, name)


def _until_killed(folder: Path) -> None:
    """Rank 1 ends in the middle of the third step's update, while the other waits for its part of a layer."""
    trainer = build_trainer(folder, **THREE_STEPS)

    def killed(network: nn.Module, arguments: object) -> None:
        if trainer.step == 2 and not trainer.state.whole and trainer.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.roles.critic.trunk.layers[1].register_forward_pre_hook(killed)
    trainer.train()


def _three_steps(folder: Path, resume: bool) -> None:
    build_trainer(folder, **THREE_STEPS).train(resume=resume)


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named_and_the_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    with pytest.raises(RankFailed) as failed:
        run_ranks(2, _until_killed, tmp_path / "killed")
    assert "rank 1 of 2 did not come" in failed.value.texts[0] and "has ended" in failed.value.texts[1]
    assert max(list_checkpoints(tmp_path / "killed" / "checkpoints")) == 2
    run_ranks(2, _three_steps, tmp_path / "killed", True)
    run_ranks(2, _three_steps, tmp_path / "whole", False)
    whole, killed = _model(tmp_path / "whole" / "model"), _model(tmp_path / "killed" / "model")
    assert all(torch.equal(killed[name], weight) for name, weight in whole.items())
