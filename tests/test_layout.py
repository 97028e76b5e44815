"""The tree keeps its promises: one stem for each op, imports that point downwards, no names of other packages shadowed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastppo
from fastppo.ops._backends import FAST_BACKENDS

ROOT = Path(__file__).resolve().parents[1]
STEMS = sorted(path.stem for path in (ROOT / "fastppo" / "ops").glob("[a-z]*.py"))

# Where an op is one case of a kernel that has more.
OTHER_CPU_KERNELS = {"batch_invariant_linear": "matmul"}

# Floors from the ground up; a module may import from its own floor and those below.
FLOORS = [
    ("fastppo._C", "fastppo.kernels"),
    ("fastppo.native", "fastppo.reference", "fastppo.ops"),
    ("fastppo.model",),
    (
        "fastppo.rollout",
        "fastppo.rewards",
        "fastppo.envs",
        "fastppo.serve",
        "fastppo.environment_config",
        "fastppo.debate_config",
        "fastppo.config",
        "fastppo.rollout_config",
        "fastppo.evaluation_config",
        "fastppo.setting_types",
        "fastppo.lora_config",
        "fastppo.recipe_config",
        "fastppo.critic_config",
        "fastppo.optimizer_config",
        "fastppo.distributed_config",
        "fastppo.search_config",
        "fastppo.setting_types",
        "fastppo.reward_model_config",
        "fastppo.sft_config",
        "fastppo.data",
        "fastppo.yaml_numbers",
        "fastppo.errors",
    ),
    ("fastppo.roles", "fastppo.learner", "fastppo.algorithms", "fastppo.evaluation", "fastppo.targets", "fastppo.plan")
    + ("fastppo.experience", "fastppo.held_out", "fastppo.best", "fastppo.callbacks", "fastppo.out_of_memory")
    + (
        "fastppo.optimizer",
        "fastppo.low_bit",
        "fastppo.checkpoint",
        "fastppo.console",
        "fastppo.run_folder",
        "fastppo.metrics",
    )
    + (
        "fastppo.plot",
        "fastppo.interruption",
        "fastppo.run_state",
        "fastppo.run_loop",
        "fastppo.export",
        "fastppo.trainer",
    )
    + (
        "fastppo.ahead",
        "fastppo.calibration",
        "fastppo.collection",
        "fastppo.distributed",
        "fastppo.sharded_checkpoint",
        "fastppo.stored_shards",
        "fastppo.reward_model_training",
        "fastppo.reward_model_checkpoints",
        "fastppo.sft",
        "fastppo.samples",
        "fastppo.critics",
        "fastppo.critic_training",
        "fastppo.stored_rollouts",
        "fastppo.tracking",
        "fastppo.doctor",
        "fastppo.report",
        "fastppo.search",
    ),
    (
        "fastppo.recipe",
        "fastppo.recipe_names",
        "fastppo.cli",
        "fastppo.commands",
        "fastppo.sizing",
        "fastppo.__main__",
        "fastppo.bench",
        "fastppo.integrations",
    )
    + ("fastppo",),
]


def floor_of(module: str) -> int:
    for level in reversed(range(len(FLOORS))):
        if any(module == name or module.startswith(name + ".") for name in FLOORS[level] if name != "fastppo"):
            return level
    assert module == "fastppo", f"{module} has no floor: add it to FLOORS"
    return len(FLOORS) - 1


def _modules() -> dict[str, Path]:
    """Every module of the package by its name; a package stands for its `__init__`."""
    found = {}
    for folder, package in (("fastppo", "fastppo"), ("bench", "fastppo.bench"), ("kernels", "fastppo.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [part for part in path.relative_to(ROOT / folder).with_suffix("").parts if part != "__init__"]
            found[".".join([package, *parts])] = path
    return found


MODULES = _modules()


def imports_of(module: str) -> set[str]:
    """Our own modules that a module imports, at any depth of its code, but for what only a type checker reads."""
    names = set()
    for node in _run_time_nodes(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastppo":
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inner if name in MODULES or name == "fastppo._C"}
            names |= modules if modules == inner else modules | {node.module}
    return names - {module}


def _run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from _run_time_nodes(child)


def package_of(module: str) -> str:
    """`fastppo.rollout.engine` -> `fastppo.rollout`; a module of the top package stands for itself."""
    return ".".join(module.split(".")[:2])


def cycle_in(graph: dict[str, set[str]]) -> list[str] | None:
    """The nodes of a cycle in order, or None."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return path[path.index(node) :] + [node]
        if node in done:
            return None
        found = next(filter(None, (visit(other, [*path, node]) for other in sorted(graph.get(node, ())))), None)
        done.add(node)
        return found

    return next(filter(None, (visit(node, []) for node in sorted(graph))), None)


@pytest.mark.parametrize("stem", STEMS)
def test_each_op_has_all_its_parts(stem):
    for part in (f"fastppo/reference/{stem}.py", f"tests/ops/test_{stem}.py", f"bench/{stem}.py"):
        assert (ROOT / part).exists(), part
    assert stem in FAST_BACKENDS
    if "cpu" in FAST_BACKENDS[stem] and not stem.startswith("linear_"):
        assert (ROOT / "csrc" / "cpu" / f"{OTHER_CPU_KERNELS.get(stem, stem)}.cpp").exists()
    if "cuda" in FAST_BACKENDS[stem]:
        assert (ROOT / "csrc" / "cuda" / f"{stem}.cu").exists()


def test_every_listed_op_exists():
    assert set(FAST_BACKENDS) == set(STEMS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module):
    for imported in imports_of(module):
        assert floor_of(imported) <= floor_of(module), f"{module} imports {imported} from a floor above"


def test_no_module_and_no_package_imports_itself_round_a_corner():
    """A package's `__init__` collects its modules' names for others: its own modules do not import from it."""
    modules = {module: imports_of(module) for module in MODULES if module != "fastppo"}
    assert cycle_in(modules) is None
    packages: dict[str, set[str]] = {}
    for module, imported in modules.items():
        packages.setdefault(package_of(module), set()).update(map(package_of, imported))
    assert cycle_in({package: others - {package} for package, others in packages.items()}) is None


def test_a_cycle_would_be_found():
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_references_stand_alone():
    for module in MODULES:
        if module.startswith("fastppo.reference"):
            foreign = {name for name in imports_of(module) if not name.startswith("fastppo.reference")}
            assert not foreign, f"{module} imports {foreign}"


def test_every_package_is_in_the_wheel():
    listed = re.search(r"packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL).group(1)
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "fastppo").rglob("__init__.py")}
    assert packages | {"fastppo.kernels", "fastppo.bench"} == set(re.findall(r'"([\w.]+)"', listed))


def test_no_test_sets_a_tolerance_of_its_own():
    """tests/tolerance.py has the one rule."""
    found = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = {node.arg} if isinstance(node, ast.keyword) else {getattr(node, "attr", None)}
            if names & {"atol", "rtol", "abs_tol", "rel_tol", "assert_close", "allclose", "isclose"}:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found


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
