"""What ends one rank ends all, soon, and with its name; what a rank lacks is said before the run."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from fastppo import Callback, cli
from fastppo import distributed as ranks_module
from fastppo.algorithms.ppo import PPO
from fastppo.checkpoint import list_checkpoints
from fastppo.run_folder import read_metrics
from tests.distributed.ranks import RankFailed, run_ranks
from tests.test_cli import write_recipe
from tests.tiny import make_model, make_tokenizer
from tests.tiny_trainer import PROMPTS, build_trainer

SOON = 60  # seconds, of which the machine may take many for itself


def rank() -> int:
    return int(os.environ["RANK"])


class AfterStep(Callback):
    """Calls something on one rank after a step."""

    def __init__(self, of_rank: int, step: int, action) -> None:
        self.place, self.action = (of_rank, step), action

    def on_step(self, trainer, metrics):
        if (rank(), trainer.step) == self.place:
            self.action()


def caught(function, *arguments, **options) -> tuple[str, str, float]:
    """(type, text, seconds until then) of what is raised."""
    started = time.monotonic()
    try:
        function(*arguments, **options)
    except BaseException as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return "", "", time.monotonic() - started


def failed(size: int, function, *arguments) -> RankFailed:
    with pytest.raises(RankFailed) as found:
        run_ranks(size, function, *arguments)
    return found.value


# Before the run


DIFFERENT = {
    "optimizer.lr 0.001 -> 0.002": {"optimizer__lr": 2e-3},
    "prompts_sha256": {"prompts": [*PROMPTS[:-1], "pp"]},
    "weights of the policy": {"model": "other"},
}


def test_ranks_that_differ_are_refused(tmp_path):
    for refusals in run_ranks(3, _differing, str(tmp_path)):
        for named, (kind, text, _) in zip(DIFFERENT, refusals, strict=True):
            assert kind == "ValueError"
            assert "rank 2 is not as rank 0" in text and named in text and "expected the same on every rank" in text
    assert not list(tmp_path.iterdir())


def _differing(folder: str) -> list:
    refusals = []
    for changes in DIFFERENT.values():
        own = {"model": make_model(seed=1)} if "model" in changes else changes
        refusals.append(caught(build_trainer, folder, **(own if rank() == 2 else {})))
    return refusals


def test_another_version_of_a_package_is_refused(tmp_path):
    for _, text, _ in run_ranks(2, _of_another_version, str(tmp_path)):
        assert "rank 1 is not as rank 0: version of torch" in text


def _of_another_version(folder: str):
    if rank() == 1:
        true, ranks_module.version = ranks_module.version, lambda name: "0.1" if name == "torch" else true(name)
    return caught(build_trainer, folder)


def test_a_reward_that_one_rank_lacks(tmp_path):
    """On the command line: every rank says which one lacks what."""
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    (tmp_path / "lengths.py").write_text(
        "def count(completions, **_):\n    return [len(text) for text in completions]\n"
    )
    recipe = write_recipe(tmp_path, "./model", "./data.jsonl", "lengths:count")
    run = {"PYTHONPATH": str(tmp_path)}
    (own, other) = run_ranks(2, _command, str(recipe), environment=run)
    assert own[0] == other[0] == 2
    assert "module lengths cannot be imported" in other[1] and "rank 1: " in own[1]
    assert not (tmp_path / "run").exists()


def _command(recipe: str):
    import contextlib
    import io
    import sys

    if rank() == 0:
        sys.path.append(os.environ["PYTHONPATH"])
    with contextlib.redirect_stderr(io.StringIO()) as said:
        return cli.main(["train", recipe, "device=cpu", "rollout.max_new_tokens=8"]), said.getvalue()


def test_a_rendezvous_that_nobody_keeps_is_an_error_within_a_minute(monkeypatch):
    assert ranks_module.RENDEZVOUS_SECONDS < 60
    kind, text, seconds = run_ranks(1, _lonely)[0]
    assert kind == "TrainingError" and "the rendezvous at 127.0.0.1:" in text and "within 2 s" in text
    assert seconds < SOON


def _lonely():
    ranks_module.RENDEZVOUS_SECONDS = 2.0
    os.environ |= {"WORLD_SIZE": "2", "RANK": "1"}
    return caught(ranks_module.ranks_of, ranks_module.DistributedConfig(), torch.device("cpu"))


@pytest.mark.parametrize("command", [["reward-model"], ["critic", "--rollouts", "x"]])
def test_commands_of_one_process_say_so(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {name: x}\ndata: {path: x}\n")
    assert cli.main([command[0], str(recipe), *command[1:]]) == 2
    assert "is started in 2 processes (WORLD_SIZE), expected one" in capsys.readouterr().err


# In the run


def _with_callback(folder: str, of_rank: int, step: int, action, changes: dict):
    trainer = build_trainer(folder, callbacks=[AfterStep(of_rank, step, action)], **{"total_steps": 5} | changes)
    return caught(trainer.train)


def fail():
    raise KeyError("this rank's own")


def test_an_error_of_one_rank_ends_all_and_is_told(tmp_path):
    found = run_ranks(3, _with_callback, str(tmp_path / "run"), 1, 2, fail, {})
    assert [kind for kind, _, _ in found] == ["TrainingError", "KeyError", "TrainingError"]
    assert found[0][1] == found[2][1] == 'rank 1: KeyError: "this rank\'s own"'
    assert max(list_checkpoints(tmp_path / "run" / "checkpoints")) == 2, "the steps that are done are saved"


def test_an_error_in_the_thread_that_samples_is_told_too(tmp_path):
    found = run_ranks(2, _failing_beside_the_update, str(tmp_path / "run"))
    assert [kind for kind, _, _ in found] == ["TrainingError", "KeyError"]
    assert found[0][1] == 'rank 1: KeyError: "this rank\'s own"'
    assert max(list_checkpoints(tmp_path / "run" / "checkpoints")) == 2, "the steps that are done are saved"


def _failing_beside_the_update(folder: str):
    trainer = build_trainer(folder, total_steps=5, rollout__staleness=1)
    share = trainer.ahead.collector.share

    def failing(*arguments, **options):
        return fail() if rank() == 1 and trainer.step == 1 else share(*arguments, **options)

    trainer.ahead.collector.share = failing
    return caught(trainer.train)


def vanish():
    os._exit(9)


@pytest.mark.parametrize("gone", [1, 0])
def test_a_rank_that_is_gone_is_named_and_costs_no_step(gone, tmp_path):
    """Also rank 0, whose place at the folder another one takes."""
    error = failed(3, _reporting, str(tmp_path / "run"), gone)
    assert error.texts[gone] == "the process has ended"
    for other in {0, 1, 2} - {gone}:
        assert f"LostRank: rank {gone} of 3 did not come to:" in error.texts[other]
    saved = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert max(saved) == 2, "the step that was done"


def _reporting(folder: str, gone: int):
    callback = AfterStep(gone, 2, vanish)
    build_trainer(folder, callbacks=[callback], total_steps=5, checkpoint__every=0).train()


def test_a_rank_that_hangs_is_named_in_time(tmp_path):
    found = run_ranks(3, _beside_one_that_hangs, tmp_path)
    for kind, _, seconds in found[:2]:
        assert kind == "LostRank" and seconds < SOON
    assert any("rank 2 of 3 did not come to" in text and "distributed.timeout = 8 s" in text for _, text, _ in found)


def _beside_one_that_hangs(folder: Path):
    """Rank 2 hangs until the others have raised."""
    ended = [folder / f"{other} has raised" for other in range(2)]

    def hang():
        deadline = time.monotonic() + SOON
        while not all(path.exists() for path in ended) and time.monotonic() < deadline:
            time.sleep(0.1)

    found = _with_callback(str(folder / "run"), 2, 1, hang, {"distributed__timeout": 8})
    if rank() < 2:
        ended[rank()].touch()
    return found


def end_me():
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_to_one_rank_ends_all_with_a_checkpoint(tmp_path):
    found = run_ranks(2, _with_callback, str(tmp_path / "run"), 1, 2, end_me, {"checkpoint__every": 0})
    assert [(kind, text) for kind, text, _ in found] == [("SystemExit", "143")] * 2
    assert list(list_checkpoints(tmp_path / "run" / "checkpoints")) == [2]


def test_a_disk_that_is_full_ends_all(tmp_path):
    for number, (kind, text, _) in enumerate(run_ranks(2, _on_a_full_disk, str(tmp_path / "run"))):
        assert kind == ["CheckpointError", "TrainingError"][number]
        assert "could not be written: [Errno 28] No space left on device" in text


def _on_a_full_disk(folder: str):
    import fastppo.checkpoint

    def full(*_):
        raise OSError(28, "No space left on device")

    fastppo.checkpoint.save_file = full
    return caught(build_trainer(folder, total_steps=3, checkpoint__every=1).train)


def test_a_folder_that_cannot_be_written_ends_all(tmp_path):
    (tmp_path / "run").write_text("")
    for kind, text, _ in run_ranks(2, _train, str(tmp_path / "run")):
        assert kind in ("ValueError", "TrainingError") and "which is a file, expected a folder" in text


def _train(folder: str):
    return caught(build_trainer(folder).train)


# Votes


def test_memory_that_runs_out_on_one_rank_halves_all_budgets_and_changes_nothing(tmp_path):
    """The failed minibatch is repeated exactly."""
    plain = run_ranks(2, _weights, str(tmp_path / "plain"), False)
    short = run_ranks(2, _weights, str(tmp_path / "short"), True)
    assert short[0][1] == short[1][1] < plain[0][1]
    for name, weight in plain[0][0].items():
        assert (short[0][0][name] - weight).abs().max() < 1e-6
        assert torch.equal(short[0][0][name], short[1][0][name])


def _weights(folder: str, limited: bool):
    if limited and rank() == 1:
        loss = PPO.loss

        def failing(self, roles, rollout, *records, **options):
            if rollout.num_tokens > 30:
                raise torch.OutOfMemoryError("this rank alone")
            return loss(self, roles, rollout, *records, **options)

        PPO.loss = failing
    trainer = build_trainer(folder, rollout__samples_per_prompt=2)
    trainer.train()
    weights = {name: parameter.detach().clone() for name, parameter in trainer.roles.named_parameters()}
    return weights, trainer.learner.budget.tokens


def test_gradients_that_are_not_finite_on_one_rank_are_applied_on_none(tmp_path):
    for metrics, moved in run_ranks(2, _with_bad_gradients, str(tmp_path / "run")):
        assert metrics["update/skipped"] == 2 and not moved
    assert read_metrics(tmp_path / "run")[-1]["update/skipped"] == 2


def _with_bad_gradients(folder: str):
    if rank() == 1:
        loss = PPO.loss

        def bad(self, *records, **options):
            total, metrics = loss(self, *records, **options)
            return total * float("nan"), metrics

        PPO.loss = bad
    trainer = build_trainer(folder, total_steps=1)
    before = [parameter.detach().clone() for parameter in trainer.roles.parameters()]
    metrics = trainer.train()
    return metrics, any(not torch.equal(old, new) for old, new in zip(before, trainer.roles.parameters(), strict=True))


def test_an_unknown_fault_is_not_silenced():
    """Ranks that come to different meetings are told so."""
    for kind, text, _ in run_ranks(2, _astray):
        assert kind == "RuntimeError" and "different meetings: here, there" in text


def _astray():
    ranks = ranks_module.ranks_of(ranks_module.DistributedConfig(), torch.device("cpu"))
    return caught(ranks.exchange, "here" if ranks.first else "there")
