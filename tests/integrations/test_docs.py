"""What docs/drop-in.md shows runs as it is written there; what it calls the same is the same."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastppo.integrations
from fastppo.bench.stand_ins import ASIDE, standing_in
from fastppo.integrations.patching import Peer
from tests.tolerance import assert_as_exact_as_native

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "drop-in.md").read_text()
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE))
INTRODUCTION, OWN = TEXT.partition("\n## ")[0], "Your own trainer"
MODULES = sorted(path.stem for path in Path(fastppo.integrations.__file__).parent.glob("[a-z]*.py"))
UNDERNEATH = (
    "deferred_logits",
    "masks",
    "model_patch",
    "patching",
    "transformers_layers",
    "verl_aggregation",
)  # of other modules


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def a_cleanrl_minibatch() -> dict:
    """The names that CleanRL's script has where its lines are replaced."""
    steps, envs = 8, 2
    columns = {name: torch.randn(steps, envs) for name in ("rewards", "values")}
    flat = {f"b_{name}": torch.randn(steps * envs) for name in ("logprobs", "advantages", "returns", "values")}
    new = {name: torch.randn(4, requires_grad=True) for name in ("newlogprob", "entropy", "newvalue")}
    args = SimpleNamespace(
        gamma=0.99, gae_lambda=0.95, clip_coef=0.2, clip_vloss=True, norm_adv=True, ent_coef=0.01, vf_coef=0.5
    )
    last = {"dones": torch.zeros(steps, envs), "next_value": torch.randn(1, envs), "next_done": torch.zeros(envs)}
    return columns | flat | new | last | {"args": args, "mb_inds": torch.arange(4)}


def peers_of(code: str) -> list[Peer]:
    """Of our modules that the code imports."""
    names = set(re.findall(r"from fastppo\.integrations import (\w+)", code))
    names |= set(re.findall(r"(?:from|import) fastppo\.integrations\.(\w+)", code))
    modules = [import_module(f"fastppo.integrations.{name}") for name in sorted(names)]
    return [value for module in modules for value in vars(module).values() if isinstance(value, Peer)]


def why_not(peer: Peer) -> str | None:
    """Why nothing can be patched here: the package is absent, of another version, or installed without what it imports."""
    try:
        for replacement in peer._replacements[peer._tested_version()]:
            with standing_in(ASIDE.get(peer.package, ())):
                import_module(replacement.target.partition(":")[0])
    except (ImportError, RuntimeError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("title", ["", *(title for title, text in SECTIONS.items() if blocks(text) and title != OWN)])
def test_its_examples_run(title):
    """And leave no package patched."""
    code = blocks(SECTIONS[title] if title else INTRODUCTION)
    for peer in peers_of("\n".join(code)):
        if reason := why_not(peer):
            pytest.skip(reason)
    names: dict = a_cleanrl_minibatch() if title.startswith("CleanRL") else {}
    try:
        for block in code:
            exec(compile(block, "docs/drop-in.md", "exec"), names)
    finally:
        for peer in peers_of("\n".join(code)):
            peer.unpatch()


def before_and_after(title: str) -> tuple[str, str]:
    before, after = blocks(re.search(rf"^### {title}\n(.*?)(?=^### |\Z)", SECTIONS[OWN], re.DOTALL | re.MULTILINE)[1])
    return before, after


TITLES = re.findall(r"^### (.*)$", SECTIONS[OWN], re.MULTILINE)


def a_trainer(until: str, dtype: torch.dtype = torch.float32) -> dict:
    """The names that the section has before `until`, made as it first shows; rounded to fp32 in any dtype."""
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(blocks(SECTIONS[OWN])[0], "docs/drop-in.md", "exec"), names)
    for name, x in names.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            names[name] = x.detach().to(dtype).requires_grad_(x.requires_grad)
    for title in TITLES[: TITLES.index(until)]:
        exec(before_and_after(title)[0], names)
    return names


def run(code: str, names: dict) -> dict[str, torch.Tensor]:
    """The floating tensors that the code makes; of one that has a graph the gradient of its sum as well."""
    held = dict(names)
    exec(compile(code, "docs/drop-in.md", "exec"), names)
    made = {name: x for name, x in names.items() if isinstance(x, torch.Tensor) and x is not held.get(name)}
    made = {name: x for name, x in made.items() if x.is_floating_point()}
    gradients = {
        f"gradient of {name}": torch.autograd.grad(x.sum(), names["logits"], retain_graph=True)[0]
        for name, x in made.items()
        if x.requires_grad
    }
    return {name: x.detach() for name, x in made.items()} | gradients


@pytest.mark.parametrize("title", [title for title in TITLES if title != "Sampling"])
def test_before_and_after_are_the_same(title):
    """Values and gradients, by the error of the plain code in fp32 against itself in fp64."""
    before, after = before_and_after(title)
    exact = run(before, a_trainer(title, torch.float64))
    native, ours = run(before, a_trainer(title)), run(after, a_trainer(title))
    common = [name for name in ours if name in exact]
    assert common and ("gradient of loss" in common or title != "Loss")
    for name in common:
        assert_as_exact_as_native(ours[name], native[name], exact[name], name)


def test_both_samplers_draw_what_the_filters_keep():
    before, after = before_and_after("Sampling")
    plain, ours = a_trainer("Sampling"), a_trainer("Sampling")
    exec(before, plain)
    exec(after, ours)
    logprobs = torch.log_softmax(plain["scaled"].double(), dim=-1)
    for names in (plain, ours):
        kept = plain["indices"].masked_fill(~plain["kept"], -1)
        assert (kept == names["tokens"].unsqueeze(-1)).any(-1).all()
        exact = logprobs.gather(-1, names["tokens"].unsqueeze(-1)).squeeze(-1)
        assert_as_exact_as_native(names["sampled_logprobs"], exact.float(), exact, "sampled_logprobs")


@pytest.mark.parametrize("module", [name for name in MODULES if name not in UNDERNEATH])
def test_its_versions_are_the_tested_ones(module):
    found = vars(import_module(f"fastppo.integrations.{module}")).values()
    peers = [value for value in found if isinstance(value, Peer)]
    rows = re.findall(rf"^\| `fastppo\.integrations\.{module}` \|.*\| (.*?) \|$", TEXT, re.MULTILINE)
    assert len(rows) == len(peers)
    assert not peers or set(rows[0].split(", ")) == set(peers[0]._replacements)
    assert f"`fastppo.integrations.{module}`" in TEXT
