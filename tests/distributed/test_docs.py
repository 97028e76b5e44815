"""What docs/distributed.md shows runs as it is written there."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import torch
from torch.distributed.run import get_args_parser

from fastppo import cli
from fastppo.distributed import Ranks
from fastppo.distributed_config import DistributedConfig
from fastppo.run_folder import read_metrics
from tests.distributed.ranks import run_ranks
from tests.tiny import make_model, make_tokenizer

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "distributed.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def run_block(folder: str, block: str) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    exec(compile(block, "docs/distributed.md", "exec"), {"__name__": "script"})


def test_its_script_runs(tmp_path):
    make_model().save_pretrained(tmp_path / "runs" / "model")
    make_tokenizer().save_pretrained(tmp_path / "runs" / "model")
    for block in blocks("python"):
        run_ranks(2, run_block, str(tmp_path), block)
    rows = read_metrics(tmp_path / "runs" / "ranks")
    assert [row["step"] for row in rows] == [1, 2]
    listed = {f"distributed/{name}" for name in re.findall(r"`distributed/(\w+)`", TEXT)}
    assert listed == {name for name in rows[-1] if name.startswith("distributed/")}


def test_its_commands_are_commands():
    commands = blocks("bash")[0].splitlines()
    assert len(commands) == 5
    for line in commands:
        words = shlex.split(line)
        launch = get_args_parser().parse_args(words[1:])
        assert words[0] == "torchrun"
        assert launch.training_script in ("fastppo", "script.py") and launch.module == (
            launch.training_script == "fastppo"
        )
        if launch.module:
            assert launch.training_script_args[0] in ("train", "sft") and callable(cli.main)


def test_its_settings_are_settings():
    assert f"`distributed.timeout` ({DistributedConfig.timeout:g} seconds)" in TEXT
    assert Ranks().first and Ranks().size == 1
