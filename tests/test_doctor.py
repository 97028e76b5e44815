"""`fastppo doctor`: each fault is named by its numbers, on metrics made by hand and on real short runs; a healthy run has none."""

from __future__ import annotations

import math
import re

import pytest

from fastppo import cli
from fastppo.doctor import CRITIC_STEPS, RULES, examine, examine_run
from fastppo.run_folder import MARK
from tests.tiny import make_folder

HEALTHY = {
    "objective/scores": 0.3,
    "objective/scores_std": 0.2,
    "policy/entropy_avg": 1.5,
    "objective/kl": 0.5,
    "policy/approxkl_avg": 0.01,
    "completions/mean_length": 40.0,
    "completions/clipped_ratio": 0.05,
    "val/explained_var": 0.4,
    "update/skipped": 0.0,
    "rollout/out_of_clip_rate": 0.0,
    "search/kept": 0.4,
}
SETTINGS = {
    "rollout": {"max_new_tokens": 64, "min_new_tokens": 0, "ignore_eos": False},
    "reward": {"kl_coef": 0.05},
    "optimizer": {"lr": 1e-6},
    "critic": {"kind": "separate", "lr": 5e-6},
}


def run_of(steps=40, **curves):
    """Rows of a healthy run; a curve is (first, last) and goes from one to the other in a line. `__` stands for `/`."""
    changed = {name.replace("__", "/"): ends for name, ends in curves.items()}
    rows = []
    for step in range(1, steps + 1):
        part = (step - 1) / (steps - 1)
        rows.append({"step": step, **HEALTHY} | {name: a + (b - a) * part for name, (a, b) in changed.items()})
    return rows


def names(rows, settings=SETTINGS):
    return [finding.name for finding in examine(rows, settings).findings]


def test_a_healthy_run_has_no_finding():
    assert names(run_of(objective__scores=(0.1, 0.7), completions__mean_length=(40, 45))) == []


def test_a_task_that_is_mastered_is_no_fault():
    """Entropy and KL end where a collapse would leave them, but the reward has paid for it."""
    assert names(run_of(objective__scores=(0.1, 1), policy__entropy_avg=(2.8, 0.05), objective__kl=(0, 9))) == []


FAULTS = {
    "entropy collapse": ({"policy__entropy_avg": (2.0, 0.02)}, "from 1.92 to 0.0962 nats a token .steps 37 to 40"),
    "KL blow-up": ({"policy__approxkl_avg": (0.01, 2.0)}, "nats a token"),
    "all rewards equal": ({"objective__scores_std": (0, 0)}, "in 40 of 40 steps .* same reward, 0.3"),
    "critic explains nothing": ({"val__explained_var": (-0.5, 0.0)}, "explains -1"),
    "completions cut off": ({"completions__clipped_ratio": (0.1, 0.9)}, "cut off at rollout.max_new_tokens = 64"),
    "reward hacking by length": (
        {"objective__scores": (0.1, 0.9), "completions__mean_length": (20, 60)},
        "correlation 1.00 over 40 steps",
    ),
    "updates not finite": ({"update__skipped": (1, 1)}, "40 updates in 40 steps"),
    "sampling and training disagree": ({"rollout__out_of_clip_rate": (0, 0.2)}, "outside the clip range"),
    "search finds nothing": ({"search__kept": (0.2, 0)}, "for 0.8% of the prompts .steps 37 to 40; 19.2% at first"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_with_its_numbers_and_a_setting(fault):
    curves, seen = FAULTS[fault]
    (finding,) = examine(run_of(**curves), SETTINGS).findings
    assert finding.name == fault and re.search(seen, finding.seen), finding.seen
    assert any(re.search(r"\w+\.\w+|reward", advice) for advice in finding.advice)


def test_weights_that_have_moved_since_they_sampled_are_no_disagreement_of_kernels():
    rows, stale = run_of(rollout__out_of_clip_rate=(0, 0.2)), {"rollout": SETTINGS["rollout"] | {"staleness": 1}}
    (finding,) = examine(rows, SETTINGS | stale).findings
    assert "weights have moved" in finding.seen and "rollout.staleness=0 (now 1)" in finding.advice


def test_every_rule_has_a_fault_here():
    assert {rule.name for rule in RULES} == set(FAULTS)


def test_drift_from_the_reference_that_nothing_pays_for():
    drift = run_of(objective__kl=(0, 40))
    (finding,) = examine(drift, SETTINGS).findings
    assert finding.name == "KL blow-up" and "reward.kl_coef (now 0.05)" in " ".join(finding.advice)
    assert names(run_of(objective__kl=(0, 40), objective__scores=(0.1, 2.5))) == [], "the reward made good for it"
    assert names(drift, None) == [], "without the settings nobody knows what it costs"


def test_completions_that_vanish():
    vanishing = run_of(objective__scores=(0.1, 0.9), completions__mean_length=(40, 2))
    assert names(vanishing) == ["reward hacking by length"]


def test_completions_that_are_meant_to_run_to_the_limit():
    rows = run_of(completions__clipped_ratio=(1, 1))
    for change in ({"min_new_tokens": 64}, {"ignore_eos": True}):
        assert names(rows, SETTINGS | {"rollout": SETTINGS["rollout"] | change}) == []
    assert names(rows, None) == ["completions cut off"]


def test_a_critic_is_given_time():
    rows = run_of(steps=CRITIC_STEPS - 1, val__explained_var=(0, 0))
    assert names(rows) == []


def test_what_cannot_be_judged_is_said():
    """Missing metrics (another algorithm has no critic), numbers that were not finite, and too few steps are no findings and no errors."""
    rows = [{name: value for name, value in row.items() if name != "val/explained_var"} for row in run_of()]
    diagnosis = examine(rows, SETTINGS)
    assert diagnosis.findings == [] and diagnosis.unjudged == {"critic explains nothing": "no val/explained_var"}
    assert "not judged: critic explains nothing (no val/explained_var)" in diagnosis.text()
    short = examine([{"step": 0, "eval/scores": 0.1}, *run_of(steps=3)], {})
    assert short.steps == 3 and len(short.unjudged) == len(RULES)
    for odd in (None, math.nan, "0.3", [], True):
        assert examine([{"step": step, **dict.fromkeys(HEALTHY, odd)} for step in range(9)], {}).findings == []
    for settings in ({}, {"rollout": None}, {"reward": {"kl_coef": "x"}}, {"rollout": []}):
        for curves, _ in FAULTS.values():
            examine(run_of(**curves), settings)


def test_the_command(tmp_path, capsys):
    folder = make_folder(tmp_path / "run", SETTINGS)
    for row in run_of(update__skipped=(1, 1)):
        folder.log_metrics(row["step"], {name: value for name, value in row.items() if name != "step"})
    assert cli.main(["doctor", str(folder.path)]) == 1
    printed = capsys.readouterr().out
    assert "40 steps looked at: updates not finite" in printed and "try: a lower optimizer.lr (now 1e-06)" in printed
    assert cli.main(["doctor", str(make_healthy(tmp_path / "healthy"))]) == 0
    assert capsys.readouterr().out == "40 steps looked at: nothing wrong found\n"


def make_healthy(path):
    folder = make_folder(path, SETTINGS)
    for row in run_of(objective__scores=(0.1, 0.7)):
        folder.log_metrics(row["step"], {name: value for name, value in row.items() if name != "step"})
    return folder.path


@pytest.mark.parametrize("command", ["doctor", "report", "plot"])
def test_folders_that_are_no_finished_run(tmp_path, capsys, command):
    """None at all, a file, something else's folder, an empty one, a run in its first step, one with a damaged line: a line of error each."""
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("a: 1\n")
    make_folder(tmp_path / "begun", SETTINGS)
    damaged = make_healthy(tmp_path / "damaged")
    (damaged / "metrics.jsonl").write_bytes(b"\0\0\n")
    nothing = make_healthy(tmp_path / "nothing")
    (nothing / "metrics.jsonl").write_bytes(b'{"step": 1, "obj')
    for name, message in {
        "missing": "is no run folder: it does not exist",
        "file": "is no run folder: it is a file",
        "empty": "is no run folder: it has no metrics.jsonl",
        "other": "is no run folder: it has no metrics.jsonl",
        "begun": "the run has finished no step",
        "damaged": "line 1 is not JSON",
        "nothing": "no metrics",
    }.items():
        assert cli.main([command, str(tmp_path / name)]) == 2, name
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


@pytest.mark.parametrize("command", ["doctor", "report", "plot"])
def test_half_written_and_under_way(tmp_path, command):
    """A line that is being written is passed over; samples and settings may be missing or torn."""
    run = make_healthy(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "objec')
    (run / "samples.jsonl").write_text('{"step": 1, "prompt": "p", "completion": "c", "score": 1.0}\n{"step"')
    (run / "config.yaml").write_text(MARK + "a: [")
    (run / "history.jsonl").write_text("{")
    assert cli.main([command, str(run)]) == 0
    for name in ("samples.jsonl", "config.yaml", "history.jsonl"):
        (run / name).unlink()
    assert cli.main([command, str(run)]) == 0


# Real runs of a tiny model

BANDIT = {
    "rollout__prompts_per_step": 16,
    "rollout__samples_per_prompt": 4,
    "rollout__batch_size": 64,
    "rollout__max_new_tokens": 6,
    "rollout__min_new_tokens": 6,
    "advantage__gae_lambda": 1.0,
    "learner__num_minibatches": 4,
    "learner__epochs": 2,
    "optimizer__lr": 3e-3,
    "critic__lr": 3e-3,
    "total_steps": 12,
}


def copies(prompts, completions, **_):
    return [text.count(prompt) / 6 for prompt, text in zip(prompts, completions, strict=True)]


def constant(prompts, completions, **_):
    return [0.5] * len(completions)


def diagnose(make_trainer, tmp_path, reward, **changes):
    make_trainer(reward, prompts=["a", "b"] * 8, **BANDIT | changes).train()
    return examine_run(tmp_path / "run")


def test_a_real_run_that_learns(make_trainer, tmp_path):
    diagnosis = diagnose(make_trainer, tmp_path, copies, total_steps=24)
    assert diagnosis.steps == 24 and not diagnosis.findings and not diagnosis.unjudged, diagnosis.text()


def test_a_real_run_whose_rewards_are_equal(make_trainer, tmp_path):
    found = diagnose(make_trainer, tmp_path, constant).findings
    assert "all rewards equal" in [finding.name for finding in found]


def test_a_real_run_whose_learning_rate_is_too_high(make_trainer, tmp_path):
    found = diagnose(make_trainer, tmp_path, copies, optimizer__lr=0.3)
    assert {"entropy collapse", "KL blow-up"} & {finding.name for finding in found.findings}, found.text()
