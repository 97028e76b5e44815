"""What docs/observability.md shows runs as it is written there, and what it lists is what there is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import yaml

from fastppo import cli
from fastppo.config import TrackingConfig
from fastppo.console import COLUMNS
from fastppo.doctor import RULES

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "observability.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_its_code_and_commands_run(make_trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("short", "longer"):
        make_trainer(output_dir=tmp_path / "runs" / name).train()
    names: dict = {}
    exec(compile(blocks("python")[0], "docs/observability.md", "exec"), names)
    assert len(names["rewards"]) == 2 and names["sample"]["tokens"]
    for line in blocks("bash")[0].splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "fastppo" and cli.main(words[1:]) == 0, line
    assert (tmp_path / "runs" / "short" / "report.html").exists() and (tmp_path / "curves.png").exists()


def test_its_tables_are_complete():
    tables = "\n".join(re.findall(r"^\|.*$", TEXT, re.MULTILINE))
    for title, (metric, _) in COLUMNS.items():
        assert title in tables and f"`{metric}`" in tables
    for rule in RULES:
        assert f"| {rule.name} |" in tables


def test_its_settings_are_settings():
    settings = yaml.safe_load(blocks("yaml")[0])["tracking"]
    assert TrackingConfig(**settings).project == "carrying"
