"""`fastppo report`: one file that needs nothing else, says what the run recorded, and lets no text of the run act; `fastppo plot` of several."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from fastppo import cli
from fastppo.report import collect, render, thin_out, write_report
from fastppo.run_folder import read_samples
from tests.tiny import make_folder, make_tokenizer

HOSTILE = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\"> <!-- &amp; \u2028 \ud83d"


def make_run(path, samples=()):
    folder = make_folder(path, {"total_steps": 9, "optimizer": {"lr": 1e-3}, "odd": math.inf, "name": HOSTILE})
    for step in range(1, 7):
        folder.log_metrics(step, {"objective/scores": step / 7, "val/explained_var": -50.0 / step, HOSTILE: 1.0})
        folder.log_samples(step, samples)
    return folder.path


def hostile_sample():
    tokens = [HOSTILE, "a\n", "", " b"]
    return {
        "prompt": HOSTILE,
        "completion": HOSTILE,
        "score": 0.5,
        "rewards": {HOSTILE: None},
        "ended": HOSTILE,
        "tokens": tokens,
        "logprobs": [-0.5, -9.0, None, 0.0],
        "advantages": [1.0, -2.0, 0.0, None],
        "values": [0.0] * 4,
    }


class Page(HTMLParser):
    """Elements with their attributes, and the text of each script."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self.inside = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = dict(attributes).get("id", "code") if tag == "script" else None

    def handle_data(self, text):
        if self.inside:
            self.scripts[self.inside] = self.scripts.get(self.inside, "") + text

    def handle_endtag(self, tag):
        self.inside = None


def test_the_page_holds_the_run_and_nothing_acts(tmp_path):
    path = write_report(make_run(tmp_path / "run", [hostile_sample()]))
    assert path == tmp_path / "run" / "report.html"
    page = Page(path.read_text(encoding="ascii"))
    assert [tag for tag, _ in page.elements].count("script") == 2 and "img" not in dict(page.elements)
    data = json.loads(page.scripts["data"])
    shown = HOSTILE.replace("\ud83d", "\N{REPLACEMENT CHARACTER}")
    assert data["samples"][0]["completion"] == shown and data["samples"][0]["logprobs"] == [-0.5, -9.0, None, 0.0]
    assert data["steps"] == [1, 2, 3, 4, 5, 6] and data["settings"]["odd"] == "Infinity"
    assert data["state"] == "step 6 of 9"
    outside = [value for _, attributes in page.elements for value in attributes.values() if "//" in (value or "")]
    assert not outside and not re.search(
        r"innerHTML|document\.write|eval\(|fetch\(|https?://(?!www\.w3\.org)", page.scripts["code"]
    )


def test_what_older_or_damaged_rows_lack_is_left_out(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": "x"}], "completion": "c", "score": None},
        {},
        {"tokens": 3, "rewards": None},
        {"rewards": [1.0]},
    ]
    data = collect(make_run(tmp_path / "run", rows))
    assert [sample["tokens"] for sample in data["samples"][:3]] == [[], [], []]
    assert data["samples"][0]["prompt"] == rows[0]["prompt"] and data["samples"][1]["score"] is None
    render(data)


def test_a_run_without_samples_and_one_with_too_many(tmp_path):
    assert collect(make_run(tmp_path / "run"))["samples"] == []
    samples = [{"step": step, "completion": "x" * 100} for step in range(1, 101) for _ in range(3)]
    kept = thin_out(samples, 10_000)
    assert len({sample["step"] for sample in kept}) == len(kept) / 3 and kept[-1]["step"] == 100
    assert 5_000 < len(json.dumps(kept)) < 11_000
    assert thin_out(samples, 10**9) == samples and thin_out([], 1) == []


def test_the_history_says_what_a_resume_changed(tmp_path):
    folder = make_folder(tmp_path / "run", {"optimizer": {"lr": 1e-3}})
    folder.log_metrics(1, {"objective/scores": 1.0})
    folder.resume({"optimizer": {"lr": 2e-3}}, 1)
    assert [row["changes"] for row in collect(folder.path)["history"]] == [[], ["optimizer.lr 0.001 -> 0.002"]]


BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)


def in_browser(path) -> str:
    """The page as it stands once its script has run."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120, check=True).stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_shows_it(tmp_path):
    page = in_browser(write_report(make_run(tmp_path / "run", [hostile_sample(), {"completion": "plain"}])))
    assert "<title>run" in page and "owned'</title>" not in page, "the hostile texts have not run"
    assert page.count('class="row"') == 12 and "12 of 12 samples" in page
    assert page.count("<svg") == 3, "two panels and the chosen metric"
    assert "cut at -1" in page and "&lt;/script&gt;" in page


def test_a_real_run_logs_every_token_with_its_numbers(make_trainer, tmp_path):
    """Also the samples that are not learned from, without what only those have that are."""

    def fails_on_the_second(prompts, completions, **_):
        return [None if index == 1 else float(len(text)) for index, text in enumerate(completions)]

    make_trainer(fails_on_the_second, total_steps=1, num_logged_samples=3).train()
    samples = read_samples(tmp_path / "run")
    assert [sample["score"] is None for sample in samples] == [False, True, False]
    for sample in samples:
        count = len(sample["tokens"])
        assert count == len(sample["logprobs"]) > 0 and all(value <= 0 for value in sample["logprobs"])
        text = "".join(sample["tokens"]).replace("<eos>", "").replace("<pad>", "")
        assert text == sample["completion"] and sample["ended"] in ("stop", "length")
        learned = sample["score"] is not None
        assert ("advantages" in sample) == ("values" in sample) == learned
        assert not learned or len(sample["advantages"]) == len(sample["values"]) == count


def test_samples_are_logged_when_their_rewards_end_the_run(make_trainer, tmp_path):
    from fastppo.trainer import TrainingError

    with pytest.raises(TrainingError):
        make_trainer(lambda prompts, completions, **_: [math.nan] * len(completions)).train()
    assert [sample["score"] for sample in read_samples(tmp_path / "run")] == [None] * 4


def test_the_tokens_make_up_the_text(stories_model):
    """Spaces that a tokenizer drops at a beginning, and characters of several tokens."""
    from transformers import AutoTokenizer

    from fastppo.model.decoding import token_texts

    tokenizer = AutoTokenizer.from_pretrained(stories_model)
    text = "Once upon a time, 中 café \U0001f600!\nThe  end"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = token_texts(tokenizer, ids)
    assert len(parts) == len(ids) and "".join(parts) == tokenizer.decode(ids) and "" in parts
    assert parts[1].startswith(" ") and token_texts(tokenizer, []) == []
    assert token_texts(tokenizer, ids[: parts.index("") + 1])[-1] != "", "half a character at the end is shown as one"
    assert token_texts(make_tokenizer(), [2, 1, 999, 3]) == ["a", "<eos>", "", "b"], "a token that the tokenizer lacks"


# Several runs in one picture


def test_several_runs_in_one_picture(tmp_path, monkeypatch, capsys):
    runs = [make_run(tmp_path / name) for name in ("a$b^$", "_hidden", "deep/run", "other/run")]
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plot", *map(str, runs)]) == 0
    assert capsys.readouterr().out == "curves.png\n"
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG" and not (runs[0] / "curve.png").exists()
    assert cli.main(["plot", str(runs[0]), str(runs[0]), "-o", "x.png"]) == 2
    assert "is given twice" in capsys.readouterr().err
    assert cli.main(["plot", str(runs[0]), "nowhere"]) == 2


def test_runs_are_told_apart(tmp_path):
    from matplotlib.figure import Figure

    from fastppo.plot import PANELS, _names, _overlay

    assert _names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert _names([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == [f"{tmp_path}/a/run", f"{tmp_path}/b/run"]
    axes, panel = Figure().add_subplot(), next(panel for panel in PANELS if panel.title == "Reward")
    rows = [{"step": step, "objective/scores": 1.0, "eval/scores": 2.0} for step in (1, 2)]
    _overlay(axes, panel, [rows, rows])
    assert [line.get_color() for line in axes.lines] == ["C0", "C1", "C0", "C1"]
    assert [line.get_linestyle() for line in axes.lines] == ["-", "-", "--", "--"]
