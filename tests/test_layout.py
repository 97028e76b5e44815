"""The tree keeps its promises: one stem for each op, imports that point downwards, no names of other packages shadowed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastppo
from fastppo.ops._backends import FAST_BACKENDS

ROOT = Path(__file__).resolve().parents[1]
STEMS = sorted(path.stem for path in (ROOT / "fastppo" / "ops").glob("[a-z]*.py"))

# Floors from the ground up; a module may import from its own floor and those below.
FLOORS = [
    ("fastppo._C", "fastppo.native", "fastppo.kernels", "fastppo.reference"),
    ("fastppo.ops",),
    ("fastppo.rollout", "fastppo.models", "fastppo.rewards", "fastppo.config", "fastppo.data"),
    ("fastppo.actor_critic", "fastppo.experience", "fastppo.minibatch", "fastppo.optimizer", "fastppo.update")
    + (
        "fastppo.checkpoint",
        "fastppo.console",
        "fastppo.run_folder",
        "fastppo.plot",
        "fastppo.recipe",
        "fastppo.trainer",
    ),
    ("fastppo.cli", "fastppo.__main__", "fastppo.bench", "fastppo"),
]


def floor_of(module: str) -> int:
    for level in reversed(range(len(FLOORS))):
        if any(module == name or module.startswith(name + ".") for name in FLOORS[level] if name != "fastppo"):
            return level
    assert module == "fastppo", f"{module} has no floor: add it to FLOORS"
    return len(FLOORS) - 1


def modules() -> list[tuple[str, Path]]:
    found = []
    for folder, package in (("fastppo", "fastppo"), ("bench", "fastppo.bench"), ("kernels", "fastppo.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [part for part in path.relative_to(ROOT / folder).with_suffix("").parts if part != "__init__"]
            found.append((".".join([package, *parts]), path))
    return found


def imports_of(path: Path) -> set[str]:
    """Names of our own modules that a file imports, at any depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            package = node.module
            is_module = (ROOT / package.replace(".", "/")).is_dir()
            names |= {f"{package}.{alias.name}" for alias in node.names} if is_module else {package}
    return {name for name in names if name.split(".")[0] == "fastppo"}


@pytest.mark.parametrize("stem", STEMS)
def test_each_op_has_all_its_parts(stem):
    for part in (f"fastppo/reference/{stem}.py", f"tests/ops/test_{stem}.py", f"bench/{stem}.py"):
        assert (ROOT / part).exists(), part
    assert stem in FAST_BACKENDS
    if "cpu" in FAST_BACKENDS[stem] and not stem.startswith("linear_"):
        assert (ROOT / "csrc" / "cpu" / f"{stem}.cpp").exists()
    if "cuda" in FAST_BACKENDS[stem]:
        assert (ROOT / "csrc" / "cuda" / f"{stem}.cu").exists()


def test_every_listed_op_exists():
    assert set(FAST_BACKENDS) == set(STEMS)


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_point_downwards(module, path):
    level = floor_of(module)
    for imported in imports_of(path):
        parent = imported.rsplit(".", 1)[0]
        names_a_module = imported == "fastppo._C" or any(imported == name for name, _ in modules())
        target = imported if names_a_module else parent
        assert floor_of(target) <= level, f"{module} imports {imported} from a floor above"


def test_references_stand_alone():
    for path in (ROOT / "fastppo" / "reference").glob("*.py"):
        foreign = {name for name in imports_of(path) if not name.startswith("fastppo.reference")}
        assert not foreign, f"{path.name} imports {foreign}"


def test_public_names_are_documented():
    for name in fastppo.__all__:
        if name != "__version__":
            assert (getattr(fastppo, name).__doc__ or "").strip(), f"fastppo.{name} has no docstring"


def test_readme_shows_the_tree_as_it_is():
    tree = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    folders = re.findall(r"^(\S+/)", tree.group(1), re.MULTILINE)
    assert folders
    for folder in folders:
        assert (ROOT / folder).is_dir(), folder


def test_our_kernels_folder_is_not_taken_for_another_package(tmp_path):
    """With the checkout on sys.path, `import kernels` finds our folder; Transformers, which looks for a package of that name, must not care."""
    code = "import transformers, fastppo; from transformers import LlamaConfig, LlamaForCausalLM\n"
    code += "LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
