"""Recipe files: YAML that maps one to one on a dataclass, `fastppo.recipe_config.Recipe` above all, with overrides from the command line."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from fastppo.debate_config import Debate, Speech
from fastppo.envs import READY_TOOLS, AgentProgram, Tools
from fastppo.envs.adapters import READY_ENVIRONMENTS
from fastppo.recipe_config import (
    EvalSetConfig,
    Recipe,
    RecipeEnvironmentConfig,
    RecipeRewardConfig,
    RewardFunctionConfig,
)
from fastppo.recipe_names import Names
from fastppo.rewards import READY, WeightedReward
from fastppo.yaml_numbers import NumberLoader

AnyRecipe = TypeVar("AnyRecipe")
MOST_VALUES = 10_000
# Settings that may name a file or folder; the `path` of one of `data.eval_sets` may too, and the `function` of one of `reward.functions`,
# before its colon.
PATHS = (("model", "name"), ("model", "tokenizer"), ("data", "path"), ("data", "eval_path"), ("critic", "model"))
PATH_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".gz", ".py")
ENVIRONMENT = re.compile(r"\$\{env:(\w+)\}")


class _UniqueKeyLoader(NumberLoader):
    """YAML in which a key may stand once only, where the second would silently replace the first, and aliases (`*name`) make no more values
    than a recipe can need."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _count_values(node, {}) > MOST_VALUES:
            raise ValueError(f"its aliases (*name) make more than {MOST_VALUES} values of it, or one without end")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise ValueError(f"line {key_node.start_mark.line + 1}: {key!r} cannot be a key")
            if key in seen:
                raise ValueError(f"line {key_node.start_mark.line + 1}: {key} stands there twice")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _count_values(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values `node` stands for once every alias is a copy; infinite where it holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        children = node.value if isinstance(node, yaml.CollectionNode) else ()
        pairs = (child if isinstance(child, tuple) else (child,) for child in children)
        known[id(node)] = 1 + sum(_count_values(child, known) for pair in pairs for child in pair)
    return known[id(node)]


def _load_yaml(text: str | bytes) -> Any:
    """Raises ValueError with the reason in one line."""
    try:
        return _UniqueKeyLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"not valid YAML: {_one_line(error)}") from error


def load_recipe(
    path: str | Path | None, overrides: list[str] | tuple[str, ...] = (), kind: type[AnyRecipe] = Recipe
) -> AnyRecipe:
    """The recipe at `path` with `overrides`: "optimizer.lr=1e-5", "total_steps=5", or "gamma=0.9" where only one section has the key.

    A relative path in the recipe starts beside the recipe, one in an override in the working directory; `output_dir` always there. Raises
    FileNotFoundError, or ValueError that names the key, what it was and what it should be.

    path: None for a recipe that sets nothing. kind: the dataclass that it maps on, with the sections `model` and `data`.
    """
    names, typed = Names(kind), set()
    path = None if path is None else Path(path).expanduser()
    settings = {} if path is None else _read(path, names)
    for override in overrides:
        section, key, value = _parse_override(override, names)
        (settings.setdefault(section, {}) if section else settings)[key] = value
        typed.add((section, key))
    names.refuse_booleans(settings)
    try:
        recipe = TypeAdapter(kind).validate_python(settings)
    except ValidationError as error:
        raise ValueError("; ".join(_explain(problem) for problem in error.errors())) from None

    def start_of(section: str, key: str) -> Path:
        return Path.cwd() if path is None or (section, key) in typed else path.absolute().parent

    for section, key in [place for place in PATHS if place[0] in names.sections]:
        _locate(getattr(recipe, section), key, f"{section}.{key}", start_of(section, key))
    if isinstance(recipe, Recipe):
        for index, reward in enumerate(recipe.reward.functions):
            _locate(reward, "function", f"reward.functions.{index}.function", start_of("reward", "functions"))
        environment, start = recipe.environment, start_of("environment", "factory")
        if environment.factory:
            environment.factory = _located(environment.factory, "function", "environment.factory", start)
        if environment.agent:
            start = start_of("environment", "agent")
            environment.agent = _located(environment.agent, "function", "environment.agent", start)
        start = start_of("environment", "command")
        environment.command = [
            _located(word, "path", f"environment.command.{index}", start) if word.endswith(".py") else word
            for index, word in enumerate(environment.command)
        ]
        start = start_of("environment", "tools")
        environment.tools = [
            _located(tool, "function", f"environment.tools.{index}", start)
            for index, tool in enumerate(environment.tools)
        ]
    for name, held_out in getattr(recipe.data, "eval_sets", {}).items():
        _locate(held_out, "path", f"data.eval_sets.{name}.path", start_of("data", "eval_sets"))
    return recipe


def _read(path: Path, names: Names) -> dict[str, Any]:
    """Run key -> value and section -> key -> value, with every name checked."""
    if not path.is_file():
        raise FileNotFoundError(f"recipe {path} {'is no file' if path.exists() else 'does not exist'}")
    try:
        settings = _load_yaml(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"recipe {path} is {_one_line(error)}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"recipe {path} is {type(settings).__name__}, expected sections: {', '.join(names.sections)}")
    for name, values in settings.items():
        if name not in names.run_keys:
            names.check_section(str(name), values, f"recipe {path}")
    return settings


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _parse_override(override: str, names: Names) -> tuple[str, str, Any]:
    """(section or "" for a run key, key, value) of "section.key=value" or "key=value". A setting that is a text gets the text as it was typed,
    but `null` for none where it may have none; all others are YAML."""
    name, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"override {override!r} has no '=', expected section.key=value, for example optimizer.lr=1e-5")
    section, key = names.resolve(name.strip(), f"override {override!r}")
    kinds = names.kinds(section, key)
    if kinds <= {str, type(None)}:
        return section, key, None if text == "null" and type(None) in kinds else text
    try:
        return section, key, _load_yaml(text)
    except ValueError as error:
        raise ValueError(f"override {override!r}: the value is {error}") from error


def _explain(problem: dict[str, Any]) -> str:
    """One of pydantic's errors in the project's wording."""
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "value_error":  # our own check of a section, or of several: its message names the key
        return f"{where}.{problem['ctx']['error']}" if where else str(problem["ctx"]["error"])
    known = [spec.name for spec in dataclasses.fields(_owner(problem["loc"]))]
    if problem["type"] == "unexpected_keyword_argument":
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.0)[0]
        return f"key {where} is not known; the nearest is {near}"
    if problem["type"] == "missing":
        return f"{where} is missing"
    if problem["type"] == "dataclass_type":
        return f"{where} is {problem['input']!r}, expected keys and values: {', '.join(known)}"
    expected = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{where} is {problem['input']!r}: {expected.replace('input should be', 'expected')}"


def _owner(place: tuple[str | int, ...]) -> type:
    """Whose key it is, below those of a section."""
    if place[:1] == ("environment",):
        return Speech if "speeches" in place else Debate
    return EvalSetConfig if place[:1] == ("data",) else RewardFunctionConfig


def _locate(section: Any, key: str, name: str, folder: Path) -> None:
    if given := getattr(section, key):
        setattr(section, key, _located(given, key, name, folder))


def _located(given: str, key: str, name: str, folder: Path) -> str:
    """A path that starts in `folder`, made absolute. What is neither there nor looks like a path stays: a name on the hub, a module.

    Raises ValueError where the working directory has what was to stand beside the recipe.
    """
    text, colon, function = given, "", ""
    if key == "function":
        text, colon, function = text.rpartition(":")
    looks_like_a_path = text.startswith((".", "/")) or text.endswith(PATH_ENDINGS)
    if not text or (key == "function" and not text.endswith(".py")):
        return given
    if not (folder / text).exists() and Path(text).exists():
        raise ValueError(
            f"{name} is {text!r}, which is not beside the recipe ({folder / text} does not exist): write ./{text} as an override, which starts in "
            f"the working directory, or the path from the recipe's folder, {os.path.relpath(text, folder)}"
        )
    is_here = (folder / text).exists() or looks_like_a_path
    return f"{os.path.normpath(folder / text)}{colon}{function}" if is_here else given


def resolve_rewards(config: RecipeRewardConfig) -> list[WeightedReward]:
    """The functions that `reward.functions` names, each with its arguments bound to it, `${env:NAME}` in them replaced by that variable's value;
    of a class, the object that it makes of them.

    Raises FileNotFoundError or ValueError when one cannot be imported, is not there, or does not take its arguments, and what a class raises.
    """
    return [
        WeightedReward(_resolve(reward, f"reward.functions.{index}"), reward.weight, reward.normalise)
        for index, reward in enumerate(config.functions)
    ]


def resolve_environment(config: RecipeEnvironmentConfig) -> Callable[[], Any] | AgentProgram | Debate | None:
    """What makes the environments of `environment`, the program that it names, or its debate; None where it names none.

    Raises FileNotFoundError or ValueError as `resolve_rewards` does, and TypeError for a tool that cannot be described.
    """
    if config.agent or config.command:
        return _program(config)
    if config.debate:
        return config.debate
    if config.tools:
        names = enumerate(config.tools)
        return Tools(*(_find_function(text, f"environment.tools.{index}", READY_TOOLS) for index, text in names))
    if not config.factory:
        return None
    name = "environment.arguments"
    factory, arguments = _find_function(config.factory, "environment.factory", READY_ENVIRONMENTS), config.arguments
    if config.factory in READY_ENVIRONMENTS:
        try:
            inspect.signature(factory).bind(**arguments)
        except TypeError as error:
            raise ValueError(f"{name} is {arguments!r}, but {config.factory} {error}") from error
        return _made(factory, _from_environment(arguments, name), name)
    return functools.partial(factory, **_from_environment(arguments, name)) if arguments else factory


def _program(config: RecipeEnvironmentConfig) -> AgentProgram:
    name = "agent" if config.agent else "command"
    program = _find_function(config.agent, "environment.agent", {}) if config.agent else config.command
    try:
        return AgentProgram(program)
    except (TypeError, ValueError) as error:
        error.args = (f"environment.{name}: {error}",)
        raise


def _resolve(config: RewardFunctionConfig, where: str) -> Callable[..., Any]:
    function = _find_function(config.function, f"{where}.function")
    is_class, name = isinstance(function, type), f"{where}.arguments"
    if not config.arguments and not is_class:
        return function
    try:
        signature = inspect.signature(function)
        (signature.bind if is_class else signature.bind_partial)(**config.arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {config.arguments!r}, but {config.function} {error}") from error
    arguments = _from_environment(config.arguments, name)
    if is_class:
        return _made(function, arguments, name)
    bound = functools.partial(function, **arguments)
    # Name and text only: `__wrapped__` would show the signature in which the bound arguments are still asked for.
    functools.update_wrapper(bound, function)
    del bound.__wrapped__
    return bound


def _made(kind: type, arguments: dict[str, Any], name: str) -> Callable[..., Any]:
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        error.args = (f"{name}: {error}",)
        raise


def _find_function(text: str, where: str, ready: Mapping[str, Callable[..., Any]] = READY) -> Callable[..., Any]:
    module_name, colon, name = text.rpartition(":")
    if text in ready:
        return ready[text]
    if not colon or not module_name or not name:
        near = difflib.get_close_matches(text, ready, n=1, cutoff=0.0)
        hint = f"the name of a ready function (the nearest is {near[0]}), " if near else ""
        raise ValueError(f"{where} is {text!r}, expected {hint}package.module:function or path/to/file.py:function")
    module = _load_file(Path(module_name), where) if module_name.endswith(".py") else _import(module_name, where)
    function = getattr(module, name, None)
    if not callable(function):
        offered = [known for known in dir(module) if callable(getattr(module, known)) and not known.startswith("_")]
        near = difflib.get_close_matches(name, offered, n=1)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise ValueError(f"{where} is {text!r}: {module_name} has no function {name}{hint}")
    return function


def _from_environment(value: Any, name: str) -> Any:
    """`value` with the values of the environment variables that its texts name. Raises ValueError where one is not set."""
    if isinstance(value, dict):
        return {key: _from_environment(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_from_environment(item, name) for item in value]
    if not isinstance(value, str):
        return value
    for variable in ENVIRONMENT.findall(value):
        if variable not in os.environ:
            raise ValueError(f"{name} is {value!r}, but the environment variable {variable} is not set")
    return ENVIRONMENT.sub(lambda match: os.environ[match[1]], value)


def _import(name: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever the module does when it is imported
        beside = Path(*name.split(".")).with_suffix(".py")
        hint = f"; for the file here write ./{beside}:function" if beside.is_file() else ""
        raise ValueError(f"{where}: module {name} cannot be imported: {_reason(error)}{hint}") from error


def _load_file(path: Path, where: str) -> ModuleType:
    """The module in a file, which can import its neighbours, as a script can; but what is installed comes first."""
    if not path.is_file():
        raise FileNotFoundError(f"{where}: {path} does not exist")
    path = path.resolve()
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        return _import_anew(path) if _is_importable(path) else _load_under_own_name(path)
    except Exception as error:  # whatever the file does when it is imported
        raise ValueError(f"{where}: {path} cannot be imported: {_reason(error)}") from error


def _is_importable(path: Path) -> bool:
    """Whether the file is what its name imports: so do the processes of a pool that is spawned, which look its functions up."""
    if loaded := sys.modules.get(path.stem):
        return getattr(loaded, "__file__", None) == str(path)
    found = importlib.util.find_spec(path.stem) if path.stem.isidentifier() else None
    return found is not None and found.origin == str(path)


def _import_anew(path: Path) -> ModuleType:
    sys.modules.pop(path.stem, None)  # it may have been edited since
    return importlib.import_module(path.stem)


def _load_under_own_name(path: Path) -> ModuleType:
    """Shadows no other module; dataclasses look their module up by its name."""
    spec = importlib.util.spec_from_file_location(f"fastppo_reward_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {_one_line(error)}"
