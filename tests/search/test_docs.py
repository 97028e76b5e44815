"""What docs/search.md shows runs as it is written there."""

from __future__ import annotations

import re
import shlex
import types
from pathlib import Path

import pytest
import torch

from fastppo import cli
from fastppo.commands import search
from fastppo.recipe import load_recipe
from fastppo.search import TreeParams

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "search.md").read_text()
COMMANDS = [
    shlex.split(line) for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()
]


def test_the_example_runs():
    torch.manual_seed(0)
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    shown = types.ModuleType("searches_of_the_docs")
    exec(compile(code, "docs/search.md", "exec"), shown.__dict__)
    for found in (shown.chosen, shown.guided, shown.grown):
        assert len(found) == 2 and all(0 < answer.new_tokens <= 8 * 16 for answer in found)
    assert all(answer.completion == [shown.b] * 8 for answer in shown.guided), "every token is a candidate"


SEARCHES = [command for command in COMMANDS if command[1] == "generate"]


@pytest.mark.parametrize("command", SEARCHES, ids=lambda command: command[command.index("--search") + 1])
def test_the_commands_are_understood(command):
    parser, _ = cli._parser()
    search.check(parser.parse_args(command[1:]))


def test_the_recipe_takes_what_is_typed():
    ((_, _, recipe, *overrides),) = [command for command in COMMANDS if command[1] == "train"]
    changed = load_recipe(ROOT / recipe, overrides).search
    assert changed != load_recipe(ROOT / recipe).search and changed.kind == "puct"


def test_every_setting_of_the_tree_is_named():
    for name in TreeParams.__dataclass_fields__:
        assert f"`{name}`" in TEXT or name in re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL), name
