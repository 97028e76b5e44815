"""What docs/plan.md shows runs, and what it names is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import torch
import torch.distributed as dist

from fastppo import cli, linear_token_logprobs
from fastppo.sizing.devices import GPUS

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "plan.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_its_commands_run(stories_model, capsys):
    names = {"MODEL": str(stories_model), "RECIPE": str(ROOT / "recipes" / "stories.yaml")}
    (block,) = blocks("bash")
    for line in block.splitlines():
        program, *words = (names.get(word, word) for word in shlex.split(line, comments=True))
        assert program == "fastppo"
        assert cli.main(words) == 0, f"{line}: {capsys.readouterr().err}"


def test_its_head_is_the_whole_one(tmp_path):
    """In a group of one rank; tests/ops/test_sharded_head.py has more of them."""
    shown: dict = {}
    (block,) = blocks("python")
    exec(compile(block, "docs/plan.md", "exec"), shown)
    hidden, head, labels = torch.randn(5, 8), torch.randn(30, 8), torch.arange(5)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        logprobs, own = shown["logprobs_of_a_slice"](hidden, head, labels)
        logprobs.sum().backward()
    finally:
        dist.destroy_process_group()
    assert torch.equal(logprobs.detach(), linear_token_logprobs(hidden, head, labels)) and own.grad.shape == head.shape


def test_every_device_is_named():
    assert all(re.search(rf"\b{name}\b", TEXT) for name in GPUS)


def test_every_launch_file_is_named():
    for path in (ROOT / "examples" / "launch").iterdir():
        if path.is_file():
            assert f"`{path.name}`" in TEXT, path.name
