"""A run's folder, its curves and its console output."""

from __future__ import annotations

import errno
import io
import json
import math
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from rich.console import Console

from fastppo import run_folder
from fastppo.console import COLUMNS, Reporter, printable
from fastppo.plot import PANELS, _draw, plot_run
from fastppo.run_folder import RunFolder, read_metrics, read_samples
from tests.tiny import make_folder


def test_rows_come_back(tmp_path):
    folder = make_folder(tmp_path / "run", {"ppo": {"lr": 0.1}})
    folder.log_metrics(1, {"a": 0.5, "b": math.nan})
    folder.log_metrics(2, {"a": math.inf})
    folder.log_samples(1, [{"prompt": "p", "completion": "c\n"}, {"prompt": "q"}])
    assert read_metrics(folder.path) == [{"step": 1, "a": 0.5, "b": None}, {"step": 2, "a": None}]
    assert read_samples(folder.path) == [{"step": 1, "prompt": "p", "completion": "c\n"}, {"step": 1, "prompt": "q"}]


def test_rewind_drops_later_rows_and_a_torn_line(tmp_path):
    folder = make_folder(tmp_path / "run", {})
    for step in (1, 2, 3):
        folder.log_metrics(step, {"a": step})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "a"')
    assert [row["step"] for row in read_metrics(folder.path)] == [1, 2, 3]
    folder.resume({}, 2)
    folder.log_metrics(3, {"a": 9})
    assert [row["step"] for row in read_metrics(folder.path)] == [1, 2, 3]


def test_foreign_and_finished_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds other files"):
        RunFolder(tmp_path)
    with pytest.raises(ValueError, match="which is a file"):
        RunFolder(tmp_path / "thesis.txt")
    (tmp_path / "config.yaml").write_text("somebody: else\n")
    for resume in (False, True):
        with pytest.raises(ValueError, match="holds other files"):
            RunFolder(tmp_path, resume=resume)
    assert (tmp_path / "config.yaml").read_text() == "somebody: else\n"
    folder = make_folder(tmp_path / "run", {})
    folder.log_metrics(1, {})
    with pytest.raises(ValueError, match="--resume"):
        RunFolder(tmp_path / "run")
    RunFolder(tmp_path / "run", resume=True)
    folder = make_folder(tmp_path / "unrecorded", {})
    folder.checkpoints.mkdir()
    with pytest.raises(ValueError, match="--resume"):
        RunFolder(folder.path)


def test_a_run_that_ended_in_its_first_step_starts_afresh(tmp_path):
    folder = make_folder(tmp_path / "run", {})
    folder.log_samples(1, [{"prompt": "p"}])
    folder = make_folder(tmp_path / "run", {})
    assert (folder.path / "samples.jsonl").read_text() == ""


def test_any_text_and_any_kind_of_number_is_recorded(tmp_path):
    folder = make_folder(tmp_path / "run", {"ppo": {"output_dir": "é"}})
    folder.log_samples(1, [{"prompt": "half \ud83d", "completion": "中\u2028"}])
    folder.log_metrics(1, {"numpy": np.float32(0.5), "tensor": torch.tensor(2.0)})
    folder.resume({}, 1)
    sample = json.loads((folder.path / "samples.jsonl").read_text(encoding="utf-8"))
    assert (sample["prompt"], sample["completion"]) == ("half \ud83d", "中\u2028")
    assert read_metrics(folder.path) == [{"step": 1, "numpy": 0.5, "tensor": 2.0}]


@pytest.mark.parametrize("line", [b"\0\0\0", b"[]", b'{"a": 1}'])
def test_a_damaged_line_is_named(tmp_path, line):
    folder = make_folder(tmp_path / "run", {})
    folder.log_metrics(1, {"a": 1.0})
    with (folder.path / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(ValueError, match="metrics.jsonl, line 2"):
        read_metrics(folder.path)


def test_a_folder_without_metrics_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run folder"):
        read_metrics(tmp_path)


def make_run(tmp_path, steps=20):
    folder = make_folder(tmp_path / "run", {})
    for step in range(steps):
        score = step / steps
        row = {
            "objective/scores": score,
            "objective/scores_std": 0.2,
            "policy/entropy_avg": 2 - score,
            "objective/kl": score**2,
        }
        row |= {"completions/mean_length": 30 + step, "policy/clipfrac_avg": 0.1, "val/explained_var": score}
        folder.log_metrics(step, row | ({"eval/scores": score} if step % 5 == 0 else {}))
    return folder.path


def test_the_curve_is_a_picture(tmp_path):
    path = plot_run(make_run(tmp_path))
    assert path.name == "curve.png" and path.read_bytes()[:4] == b"\x89PNG"
    assert plot_run(tmp_path / "run", tmp_path / "other.png").exists()
    for name in ("other", "other.foo"):  # the first would be written under another name
        with pytest.raises(ValueError, match=rf"out is .*{name}', expected a name with one of the endings .*\.png"):
            plot_run(tmp_path / "run", tmp_path / name)


def test_what_is_no_number_is_not_drawn(tmp_path):
    folder = make_folder(tmp_path / "run", {})
    (folder.path / "metrics.jsonl").write_text(
        '{"step": 1, "objective/scores": "high", "objective/scores_std": []}\n'
        '{"step": 2, "objective/scores": 1.0, "objective/scores_std": 0.5}\n'
    )
    assert plot_run(folder.path).exists()


def test_a_run_without_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install fastppo\[plot\]"):
        plot_run(run)


def test_nothing_to_draw(tmp_path):
    folder = make_folder(tmp_path / "run", {})
    folder.log_metrics(1, {"other": 1.0})
    with pytest.raises(ValueError, match="no metrics to draw"):
        plot_run(folder.path)


def report(terminal: bool, quiet: bool = False) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=120, highlight=False)
    with Reporter(2, quiet=quiet, console=console) as reporter:
        reporter.phase("rollout", 1, 4)
        reporter.step(1, {"objective/scores": 0.25, "time/step": 1.5, "objective/kl": math.nan})
        reporter.note("resumed [bold]here[/bold] \x1b[2J")
        reporter.step(2, {"objective/scores": 0.75, "time/step": 1.5})
    return output.getvalue()


def test_plain_lines_where_there_is_no_terminal():
    lines = report(terminal=False).splitlines()
    assert lines[0].startswith("step 1/2  reward 0.250") and "KL" not in lines[0]
    assert "\x1b" not in "".join(lines), "no escape codes in a log file"


def test_a_live_table_on_a_terminal():
    text = report(terminal=True)
    assert "reward" in text and "0.750" in text and "rollout" in text


WHOLE_STEP = {metric: 0.5 for metric, _ in COLUMNS.values()} | {
    "time/step": 4.0,
    "time/rollout": 2.0,
    "time/reward": 0.0,
    "time/score": 0.5,
    "time/update": 1.5,
}


@pytest.mark.parametrize("width", [200, 80, 60, 40, 20])
def test_a_narrow_terminal_shows_the_columns_that_fit(width):
    """Whole ones, the reward among them, and where the time went."""
    output = io.StringIO()
    reporter = Reporter(9, console=Console(file=output, force_terminal=True, width=width, color_system=None))
    reporter.rows = [(step, WHOLE_STEP) for step in (1, 2)]
    reporter.console.print(reporter._view())
    head, first, *_ = output.getvalue().splitlines()
    assert head.split()[:2] == ["step", "reward"] and first.split()[:2] == ["1", "0.500"]
    assert len(head) <= width and "\u2026" not in head + first
    assert (width < 200) or all(title in head for title in COLUMNS)
    assert "rollout 50%, reward 0%, score 12%, update 38%" in " ".join(output.getvalue().split())


def test_a_log_file_says_where_the_time_went():
    output = io.StringIO()
    with Reporter(9, console=Console(file=output, force_terminal=False, width=80)) as reporter:
        reporter.step(1, WHOLE_STEP)
        reporter.step(2, {"objective/scores": 1.0, "time/step": 0.0})
    first, second = output.getvalue().splitlines()
    assert first.endswith("(rollout 50%, reward 0%, score 12%, update 38%)") and "off band 50.0%" in first
    assert "rollout" not in second


def test_quiet_says_nothing():
    assert report(terminal=False, quiet=True) == report(terminal=True, quiet=True) == ""


def test_model_output_cannot_drive_the_terminal():
    assert printable("a\x1b[2Jb\x07\nc\t") == "a\N{REPLACEMENT CHARACTER}[2Jb\N{REPLACEMENT CHARACTER}\nc\t"
    assert "[bold]here[/bold]" in report(terminal=False), "brackets are text, not markup"
    assert printable("\u202egpj.exe\ud83d") == "\N{REPLACEMENT CHARACTER}gpj.exe\N{REPLACEMENT CHARACTER}"


def test_a_sample_cannot_pass_for_a_record_of_the_run():
    output = io.StringIO()
    with Reporter(9, console=Console(file=output, force_terminal=False, width=120)) as reporter:
        reporter.sample("before", "2+2=", "[red]5[/red]\nstep 9/9  reward 1.000\r\x1b[2J", math.nan)
    lines = output.getvalue().splitlines()
    assert lines[0] == "before  score nan" and lines[2] == "  | [red]5[/red]"
    assert all(line.startswith("  | ") for line in lines[1:]) and "\x1b" not in output.getvalue()


def test_a_terminal_without_unicode_does_not_end_the_run():
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with Reporter(2, console=Console(file=output, force_terminal=False)) as reporter:
        reporter.note("é")
    output.flush()
    assert output.buffer.getvalue() == b"?\n"


def test_the_steps_before_a_resume_say_nothing_about_the_time_left():
    with Reporter(200, console=Console(file=io.StringIO(), force_terminal=True)) as reporter:
        reporter.step(150, {})
        reporter.step(151, {})
        task = reporter.progress.tasks[0]
        assert task.completed == 151 and (task.speed is None or task.speed * task.elapsed < 10)


def test_an_outlier_of_the_critic_is_cut_off():
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    panel = next(panel for panel in PANELS if panel.title == "Critic")
    _draw(axes, panel, [{"step": 1, "val/explained_var": -50.0}, {"step": 2, "val/explained_var": 0.2}])
    assert axes.get_ylim() == panel.limits and "cut at -1" in axes.get_ylabel()


HOLD = """
import sys
from fastppo.run_folder import RunFolder
with RunFolder(sys.argv[1]).lock(print):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_run_a_folder(tmp_path):
    """The lock names who has it, keeps out other processes and other runs of this one, and ends with its process however that ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        for resume in (False, True):
            with pytest.raises(ValueError, match=f"in use by process {other.pid} on "):
                RunFolder(tmp_path / "run", resume=resume)
        other.kill()
    folder = make_folder(tmp_path / "run")
    with folder.lock(pytest.fail):
        with pytest.raises(ValueError, match="in use by another run of this process"):
            RunFolder(tmp_path / "run", resume=True)
        with pytest.raises(ValueError, match="in use"), folder.lock(pytest.fail):
            pass
    with folder.lock(pytest.fail):
        pass


def test_where_there_are_no_locks_the_run_goes_on(tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "lockf", no_locks)
    notes = []
    with make_folder(tmp_path / "run").lock(notes.append):
        pass
    assert "No locks available" in notes[0]


@pytest.mark.parametrize("entry", ["checkpoints", "model", "metrics.jsonl", "samples.jsonl", "history.jsonl"])
def test_what_will_be_written_can_be(tmp_path, entry):
    """Found before training, not after it."""
    path = make_folder(tmp_path / "run").path / entry
    path.unlink(missing_ok=True)
    path.mkdir() if "." in entry else path.write_text("")
    with pytest.raises(ValueError, match=f"{entry} is a (file|folder), expected a (folder|file)"):
        RunFolder(tmp_path / "run", resume=True)


def test_the_history_knows_which_settings_held_from_when(tmp_path):
    folder = make_folder(tmp_path / "run", {"optimizer": {"lr": 1.0, "betas": (0.9, 0.99)}, "seed": 0})
    changed = {"optimizer": {"lr": 2.0, "betas": (0.9, 0.99)}, "seed": 0}
    assert folder.resume(changed, 5) == ["optimizer.lr 1.0 -> 2.0"]
    assert folder.resume(changed, 7) == []
    history = [json.loads(line) for line in (folder.path / "history.jsonl").read_text().splitlines()]
    assert [(row["step"], row["settings"]["optimizer"]["lr"]) for row in history] == [(0, 1.0), (5, 2.0), (7, 2.0)]
    assert run_folder.read_settings(folder.path)["optimizer"] == {"lr": 2.0, "betas": [0.9, 0.99]}


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ({"api_key": "abc", "scale": 2}, {"api_key": "${env:API_KEY}", "scale": 2}),
        ({"judge": {"password": "abc"}}, {"judge": {"password": "${env:PASSWORD}"}}),
        ({"keys": ["sk-0123456789abcdef"]}, {"keys": ["${env:KEYS}"]}),
        ({"api_key": "${env:MINE}"}, {"api_key": "${env:MINE}"}),
        ({"headers": {"Authorization": "Bearer abc"}}, {"headers": {"Authorization": "${env:AUTHORIZATION}"}}),
        ({"token": "####", "key": "answer"}, {"token": "####", "key": "answer"}),
    ],
)
def test_what_looks_like_a_secret_is_not_written(tmp_path, arguments, written):
    with nullcontext() if written == arguments else pytest.warns(UserWarning, match="looks like a secret"):
        path = make_folder(tmp_path / "run", {"reward": {"functions": [{"arguments": arguments}]}}).path
    assert run_folder.read_settings(path)["reward"]["functions"] == [{"arguments": written}]
    for name in ("config.yaml", "history.jsonl"):
        assert (path / name).stat().st_mode & 0o077 == 0, "for its owner alone"
        assert "abc" not in (path / name).read_text()


class Broken(io.StringIO):
    """An output that fails in its own way."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error


OUTPUTS = {
    "head -1": BrokenPipeError(errno.EPIPE, "Broken pipe"),
    "/dev/full": OSError(errno.ENOSPC, "No space left on device"),
    "a terminal that is gone": OSError(errno.EIO, "Input/output error"),
    "closed": ValueError("I/O operation on closed file"),
    "another encoding": UnicodeEncodeError("ascii", "\ufffd", 0, 1, "ordinal not in range"),
}


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("output", OUTPUTS)
def test_an_output_that_fails_ends_the_display_alone(output, terminal, capfd):
    console = Console(file=Broken(OUTPUTS[output]), force_terminal=terminal, width=120)
    console.on_broken_pipe = exit_as_rich_does
    with Reporter(2, console=console) as reporter:
        for step in (1, 2):
            reporter.phase("rollout", 1, 4)
            reporter.step(step, {"objective/scores": 0.25})
            reporter.note("\ufffd")
            reporter.sample("before", "a", "b", 1.0)
    assert capfd.readouterr().err.count("goes on without a display") == 1


def exit_as_rich_does():
    """But for the descriptor of standard output, which is pytest's."""
    raise SystemExit(1)


@pytest.mark.parametrize("name", ["$\\frac{$", "a$b^$c_", "%s {x}", "$", "\udc80"])
def test_any_folder_name_can_be_drawn(tmp_path, name):
    run = make_run(tmp_path).rename(tmp_path / name)
    assert plot_run(run).exists()
