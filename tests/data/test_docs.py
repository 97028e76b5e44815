"""What docs/data.md shows is what happens: its files are written, its Python run as doctests, its YAML read."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
import yaml

from fastppo.data import load_train_and_eval
from fastppo.data.sources import FORMATS, OWN_ARGUMENTS
from fastppo.recipe_config import DataConfig
from tests.test_readme import load_demo

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()


@pytest.fixture
def in_a_folder_with_its_files(tmp_path, monkeypatch):
    load_demo().make_tokenizer().save_pretrained(tmp_path / "runs" / "demo" / "model")
    for name, content in re.findall(r"^`(\S+)`:\n\n```text\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE):
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)


def test_its_examples(in_a_folder_with_its_files):
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    failed = []
    for number, block in enumerate(blocks):
        test = doctest.DocTestParser().get_doctest(block, names, f"example {number}", "docs/data.md", 0)
        doctest.DocTestRunner().run(test, out=failed.append, clear_globs=False)
        names = test.globs
    assert blocks and not failed, "".join(failed)


def test_its_recipe(in_a_folder_with_its_files, tokenizer):
    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    train, _ = load_train_and_eval(DataConfig(**yaml.safe_load(block)["data"]), tokenizer)
    assert [row["level"] for row in train] == [7, None]


def test_it_names_every_format_and_every_name_that_is_taken():
    for name in (*FORMATS, *OWN_ARGUMENTS, "prompt_ids"):
        assert f"`{name}`" in TEXT
