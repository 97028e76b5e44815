"""Recipe files: YAML that maps one to one on `fastppo.config.Recipe`, with overrides from the command line."""

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
import types
import typing
from collections.abc import Callable, Hashable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import yaml
from pydantic import TypeAdapter, ValidationError

from fastppo.config import MOVED, Recipe, RecipeRewardConfig, RewardFunctionConfig, moved_to
from fastppo.rewards import READY, WeightedReward
from fastppo.yaml_numbers import NumberLoader

SECTIONS = {
    spec.name: spec.default_factory for spec in dataclasses.fields(Recipe) if isinstance(spec.default_factory, type)
}
KEYS = {name: [key.name for key in dataclasses.fields(section)] for name, section in SECTIONS.items()}
RUN_KEYS = [spec.name for spec in dataclasses.fields(Recipe) if spec.name not in SECTIONS]  # at the recipe's top level
OLD_SECTION = "ppo"
MOST_VALUES = 10_000
# Settings that may name a file or folder; the `function` of one of `reward.functions` may too, before its colon.
PATHS = (("model", "name"), ("model", "tokenizer"), ("data", "path"), ("data", "eval_path"))
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


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """The recipe at `path` with `overrides`: "optimizer.lr=1e-5", "total_steps=5", or "gamma=0.9" where only one section has the key.

    A relative path in the recipe starts beside the recipe, one in an override in the working directory; `output_dir` always there. Raises
    FileNotFoundError, or ValueError that names the key, what it was and what it should be.
    """
    path = Path(path).expanduser()
    settings, typed = _read(path), set()
    for override in overrides:
        section, key, value = _parse_override(override)
        (settings.setdefault(section, {}) if section else settings)[key] = value
        typed.add((section, key))
    _refuse_booleans(settings)
    try:
        recipe = TypeAdapter(Recipe).validate_python(settings)
    except ValidationError as error:
        raise ValueError("; ".join(_explain(problem) for problem in error.errors())) from None

    def start_of(section: str, key: str) -> Path:
        return Path.cwd() if (section, key) in typed else path.absolute().parent

    for section, key in PATHS:
        _locate(getattr(recipe, section), key, f"{section}.{key}", start_of(section, key))
    for index, reward in enumerate(recipe.reward.functions):
        _locate(reward, "function", f"reward.functions.{index}.function", start_of("reward", "functions"))
    return recipe


def _read(path: Path) -> dict[str, Any]:
    """Run key -> value and section -> key -> value, with every name checked."""
    if not path.is_file():
        raise FileNotFoundError(f"recipe {path} does not exist")
    try:
        settings = _load_yaml(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"recipe {path} is {_one_line(error)}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"recipe {path} is {type(settings).__name__}, expected sections: {', '.join(SECTIONS)}")
    for name, values in settings.items():
        if name in RUN_KEYS:
            continue
        if name not in SECTIONS:
            _refuse_name(str(name), values, f"recipe {path}")
        if not isinstance(values, dict):
            raise ValueError(f"recipe {path}: {name} is {values!r}, expected keys and values{_moved_hint(name)}")
        for key in values:
            _check_key(name, str(key), f"recipe {path}")
    return settings


def _refuse_name(name: str, values: Any, where: str) -> NoReturn:
    """A name at the top level that is neither a section nor a run key: where it belongs, or what is nearest."""
    if name == OLD_SECTION and isinstance(values, dict) and values:
        _refuse_old_keys(list(map(str, values)), where)
    if isinstance(values, dict):
        near = difflib.get_close_matches(name, SECTIONS, n=1, cutoff=0.0)[0]
        raise ValueError(f"{where}: section {name} is not known; the nearest is {near}")
    _refuse_bare_key(name, where)


def _refuse_old_keys(keys: list[str], where: str) -> NoReturn:
    """Keys under `ppo`, the one section that all of PPO's settings used to stand in: where each stands now."""
    places = {key: key if key in RUN_KEYS else moved_to(key) for key in keys}
    news = [
        f"is now {place}" if place else f"is not known; the nearest is {_nearest(key)}" for key, place in places.items()
    ]
    raise ValueError(
        f"{where}: " + "; ".join(f"{OLD_SECTION}.{key} {new}" for key, new in zip(keys, news, strict=True))
    )


def _refuse_bare_key(key: str, where: str) -> NoReturn:
    """A key without a section that is no run key."""
    hint = _elsewhere(key) or f"the nearest is {_nearest(key)}"
    raise ValueError(f"{where}: key {key} is not known; {hint}")


def _check_key(section: str, key: str, where: str) -> None:
    if key not in KEYS[section]:
        near = difflib.get_close_matches(key, KEYS[section], n=1, cutoff=0.0)[0]
        raise ValueError(f"{where}: key {section}.{key} is not known; {_elsewhere(key) or f'the nearest is {near}'}")


def _elsewhere(key: str) -> str:
    """Such as "optimizer.lr is", where other places have the key, or had it under this name; "" where none has."""
    names = [key] if key in RUN_KEYS else _owners(key) or [name for name in [moved_to(key)] if name]
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'}" if names else ""


def _owners(key: str) -> list[str]:
    """section.key of every section that has the key."""
    return [f"{section}.{key}" for section, keys in KEYS.items() if key in keys]


def _nearest(key: str) -> str:
    """The run key, or section.key, whose own name is nearest."""
    known = {name: name for name in RUN_KEYS}
    for section, keys in KEYS.items():
        known |= {name: f"{section}.{name}" for name in keys if name not in known}
    return known[difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]]


def _moved_hint(section: str) -> str:
    """`critic: shared` was a key before it became a section."""
    return f" ({section} is now {MOVED[section]})" if section in MOVED else ""


def _refuse_booleans(settings: dict[str, Any]) -> None:
    """`lr: yes` is a slip of the pen, but Python, and so pydantic, takes True for the number 1."""
    _refuse_booleans_in({key: settings[key] for key in RUN_KEYS if key in settings}, Recipe, "")
    for section in SECTIONS:
        _refuse_booleans_in(settings.get(section, {}), SECTIONS[section], f"{section}.")


def _refuse_booleans_in(values: dict[str, Any], owner: type, prefix: str) -> None:
    types = typing.get_type_hints(owner)
    for key, value in values.items():
        if isinstance(value, bool) and bool not in (types[key], *typing.get_args(types[key])):
            raise ValueError(f"{prefix}{key} is {value!r}: expected no true or false")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _parse_override(override: str) -> tuple[str, str, Any]:
    """(section or "" for a run key, key, value) of "section.key=value" or "key=value". A setting that is a text gets the text as it was typed,
    but `null` for none where it may have none; all others are YAML."""
    name, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"override {override!r} has no '=', expected section.key=value, for example optimizer.lr=1e-5")
    section, key = _resolve_name(name.strip(), f"override {override!r}")
    kinds = _kinds(SECTIONS[section] if section else Recipe, key)
    if kinds <= {str, type(None)}:
        return section, key, None if text == "null" and type(None) in kinds else text
    try:
        return section, key, _load_yaml(text)
    except ValueError as error:
        raise ValueError(f"override {override!r}: the value is {error}") from error


def _kinds(owner: type, key: str) -> set[type]:
    """The types that a setting may have; a choice of texts is a text."""
    kind = typing.get_type_hints(owner)[key]
    members = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    return {type(typing.get_args(m)[0]) if typing.get_origin(m) is typing.Literal else m for m in members}


def _resolve_name(name: str, where: str) -> tuple[str, str]:
    """(section or "", key) of "section.key", of a run key, or of a key that one section alone has."""
    section, dot, key = name.rpartition(".")
    if dot:
        if section == OLD_SECTION:
            _refuse_old_keys([key], where)
        if section not in SECTIONS:
            _refuse_name(section, {}, where)
        _check_key(section, key, where)
        return section, key
    if key in RUN_KEYS:
        return "", key
    if key in SECTIONS:
        raise ValueError(f"{where}: {key} is a section, expected {key}.key=value{_moved_hint(key)}")
    owners = _owners(key)
    if not owners:
        _refuse_bare_key(key, where)
    if len(owners) > 1:
        raise ValueError(f"{where}: several sections have {key}; write {' or '.join(owners)}")
    return owners[0].partition(".")[0], key


def _explain(problem: dict[str, Any]) -> str:
    """One of pydantic's errors in the project's wording."""
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "value_error":  # our own check of a section, or of several: its message names the key
        return f"{where}.{problem['ctx']['error']}" if where else str(problem["ctx"]["error"])
    known = [spec.name for spec in dataclasses.fields(RewardFunctionConfig)]  # the only keys below those of a section
    if problem["type"] == "unexpected_keyword_argument":
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.0)[0]
        return f"key {where} is not known; the nearest is {near}"
    if problem["type"] == "missing":
        return f"{where} is missing"
    if problem["type"] == "dataclass_type":
        return f"{where} is {problem['input']!r}, expected keys and values: {', '.join(known)}"
    expected = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{where} is {problem['input']!r}: {expected.replace('input should be', 'expected')}"


def _locate(section: Any, key: str, name: str, folder: Path) -> None:
    """Make a path that starts in `folder` absolute. What is neither there nor looks like a path stays: a name on the hub, a module.

    Raises ValueError where the working directory has what was to stand beside the recipe.
    """
    text, colon, function = getattr(section, key) or "", "", ""
    if key == "function":
        text, colon, function = text.rpartition(":")
    looks_like_a_path = text.startswith((".", "/")) or text.endswith(PATH_ENDINGS)
    if not text or (key == "function" and not text.endswith(".py")):
        return
    if (folder / text).exists() or looks_like_a_path:
        setattr(section, key, f"{os.path.normpath(folder / text)}{colon}{function}")
    if not (folder / text).exists() and Path(text).exists():
        raise ValueError(
            f"{name} is {text!r}, which is not beside the recipe ({folder / text} does not exist): write ./{text} as an override, which starts in "
            f"the working directory, or the path from the recipe's folder, {os.path.relpath(text, folder)}"
        )


def resolve_rewards(config: RecipeRewardConfig) -> list[WeightedReward]:
    """The functions that `reward.functions` names, each with its arguments bound to it, `${env:NAME}` in them replaced by that variable's value.

    Raises FileNotFoundError or ValueError when one cannot be imported, is not there, or does not take its arguments.
    """
    return [
        WeightedReward(_resolve(reward, f"reward.functions.{index}"), reward.weight, reward.normalise)
        for index, reward in enumerate(config.functions)
    ]


def _resolve(config: RewardFunctionConfig, where: str) -> Callable[..., Any]:
    function = _find_function(config.function, f"{where}.function")
    if not config.arguments:
        return function
    name = f"{where}.arguments"
    try:
        inspect.signature(function).bind_partial(**config.arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {config.arguments!r}, but {config.function} {error}") from error
    bound = functools.partial(function, **_from_environment(config.arguments, name))
    # Name and text only: `__wrapped__` would show the signature in which the bound arguments are still asked for.
    functools.update_wrapper(bound, function)
    del bound.__wrapped__
    return bound


def _find_function(text: str, where: str) -> Callable[..., Any]:
    module_name, colon, name = text.rpartition(":")
    if text in READY:
        return READY[text]
    if not colon or not module_name or not name:
        near = difflib.get_close_matches(text, READY, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{where} is {text!r}, expected the name of a ready function (the nearest is {near}), package.module:function or "
            "path/to/file.py:function"
        )
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
