"""What a recipe's scalars mean: numbers as in YAML 1.2, the rest as PyYAML has it; and the written config.yaml reads back the same."""

from __future__ import annotations

import datetime
import math

import pytest
import yaml

from fastppo.recipe import load_recipe
from fastppo.run_folder import RunFolder

MEANINGS = {
    # Numbers that YAML 1.1 takes for texts, or for other numbers
    "1e-3": 0.001,
    "1e3": 1000.0,
    "1E-3": 0.001,
    "+1e-4": 0.0001,
    "-2e5": -200000.0,
    "1.5e3": 1500.0,
    ".5e1": 5.0,
    "0o10": 8,
    "010": 10,
    "-007": -7,
    "1:30": "1:30",
    "1:30.5": "1:30.5",
    # As before
    "3": 3,
    "-3": -3,
    "+3": 3,
    "0": 0,
    "1_000": 1000,
    "1_000.5": 1000.5,
    "0x1F": 31,
    "0b101": 5,
    ".5": 0.5,
    "5.": 5.0,
    "-0.25": -0.25,
    "1.0e-05": 1e-05,
    ".inf": math.inf,
    "-.inf": -math.inf,
    "yes": True,
    "no": False,
    "on": True,
    "off": False,
    "true": True,
    "~": None,
    "null": None,
    "2024-01-01": datetime.date(2024, 1, 1),
    # No numbers
    "1.2.3": "1.2.3",
    "1e": "1e",
    "e3": "e3",
    "1e3x": "1e3x",
    "-": "-",
    ".": ".",
    "+": "+",
    "0o8": "0o8",
    "1 000": "1 000",
    "nan": "nan",
    "'1e-3'": "1e-3",
    '"010"': "010",
}


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path)


@pytest.mark.parametrize("text", [text for text in MEANINGS if text != "-"])
def test_a_scalar(tmp_path, text):
    value = recipe(tmp_path, f"data: {{task_arguments: {{x: {text}}}}}").data.task_arguments["x"]
    assert value == MEANINGS[text] and type(value) is type(MEANINGS[text])


def test_everywhere_in_a_recipe(tmp_path):
    found = recipe(
        tmp_path, "optimizer: {lr: 1e-5}\nseed: 010\ndata:\n  task_arguments: {list: [1e2, {1e1: 1e3}], text: '1e4'}\n"
    )
    assert (found.optimizer.lr, found.seed) == (1e-5, 10)
    assert found.data.task_arguments == {"list": [100.0, {10.0: 1000.0}], "text": "1e4"}


def test_not_a_number_is_read(tmp_path):
    assert math.isnan(recipe(tmp_path, "data: {task_arguments: {x: .nan}}").data.task_arguments["x"])


@pytest.mark.parametrize("value", [value for value in MEANINGS.values()] + list(MEANINGS))
def test_what_is_written_reads_back_the_same(tmp_path, value):
    """Texts that look like numbers above all: in ours and, for other programs, in YAML 1.1's eyes."""
    folder = RunFolder(tmp_path / "run")
    folder.start({"data": {"task_arguments": {"x": value}}})
    path = folder.path / "config.yaml"
    back = load_recipe(path).data.task_arguments["x"]
    assert back == value and type(back) is type(value)
    if isinstance(value, str):
        assert yaml.safe_load(path.read_text())["data"]["task_arguments"]["x"] == value
