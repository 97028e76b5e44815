"""Recipe files: YAML that maps one to one on `fastppo.config.Recipe`, with overrides from the command line."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Hashable
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from fastppo.config import Recipe, RewardConfig

SECTIONS = {section.name: section.default_factory for section in dataclasses.fields(Recipe)}
KEYS = {name: [key.name for key in dataclasses.fields(section)] for name, section in SECTIONS.items()}


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key may stand once only: the second would silently replace the first."""

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


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """The recipe at `path` with `overrides` such as "ppo.lr=1e-5", or "lr=1e-5" where only one section has the key.

    Files that the recipe names relative to itself are found from any working directory. Raises FileNotFoundError, or ValueError that names
    the key, what it was and what it should be.
    """
    path = Path(path)
    settings = _read(path)
    for override in overrides:
        section, key, value = _parse_override(override)
        settings.setdefault(section, {})[key] = value
    _refuse_booleans(settings)
    try:
        recipe = TypeAdapter(Recipe).validate_python(settings)
    except ValidationError as error:
        raise ValueError("; ".join(_explain(problem) for problem in error.errors())) from None
    _find_files(recipe, path.parent)
    return recipe


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """section -> key -> value, with every name checked."""
    if not path.is_file():
        raise FileNotFoundError(f"recipe {path} does not exist")
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"recipe {path} is not valid YAML: {_one_line(error)}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"recipe {path} is {type(settings).__name__}, expected sections: {', '.join(SECTIONS)}")
    for section, values in settings.items():
        _check_name(str(section), SECTIONS, f"recipe {path}: section")
        if not isinstance(values, dict):
            raise ValueError(f"recipe {path}: {section} is {values!r}, expected keys and values")
        for key in values:
            _check_key(section, str(key), f"recipe {path}")
    return settings


def _check_name(name: str, known: Any, what: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
        raise ValueError(f"{what} {name} is not known; the nearest is {near}")


def _check_key(section: str, key: str, where: str) -> None:
    owners = [owner for owner, keys in KEYS.items() if key in keys]
    if owners and section not in owners:
        raise ValueError(f"{where}: key {section}.{key} is not known; {owners[0]}.{key} is")
    if not owners:
        near = difflib.get_close_matches(key, KEYS[section], n=1, cutoff=0.0)[0]
        raise ValueError(f"{where}: key {section}.{key} is not known; the nearest is {near}")


def _refuse_booleans(settings: dict[str, dict[str, Any]]) -> None:
    """`lr: yes` is a slip of the pen, but Python, and so pydantic, takes True for the number 1."""
    for section, values in settings.items():
        types = typing.get_type_hints(SECTIONS[section])
        for key, value in values.items():
            if isinstance(value, bool) and bool not in (types[key], *typing.get_args(types[key])):
                raise ValueError(f"{section}.{key} is {value!r}: expected no true or false")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _parse_override(override: str) -> tuple[str, str, Any]:
    """(section, key, value) of "section.key=value" or "key=value"."""
    name, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"override {override!r} has no '=', expected section.key=value, for example ppo.lr=1e-5")
    section, dot, key = name.strip().rpartition(".")
    if not dot:
        owners = [owner for owner, keys in KEYS.items() if key in keys]
        if not owners:
            _check_name(key, [known for keys in KEYS.values() for known in keys], "override: key")
        if len(owners) > 1:
            raise ValueError(
                f"override {override!r}: {key} stands in {' and '.join(owners)}; write {owners[0]}.{key}=..."
            )
        section = owners[0]
    _check_name(section, SECTIONS, "override: section")
    _check_key(section, key, "override")
    try:
        return section, key, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not valid YAML: {_one_line(error)}") from error


def _explain(problem: dict[str, Any]) -> str:
    """One of pydantic's errors in the project's wording."""
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "value_error":  # our own check of a whole section: its message names the key
        return f"{where}.{problem['ctx']['error']}"
    expected = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{where} is {problem['input']!r}: {expected.replace('input should be', 'expected')}"


def _find_files(recipe: Recipe, folder: Path) -> None:
    """Replace names that are files beside the recipe by their paths; other names stay (hub names, the working directory)."""
    for section, key in (
        (recipe.model, "name"),
        (recipe.model, "tokenizer"),
        (recipe.data, "path"),
        (recipe.data, "eval_path"),
    ):
        name = getattr(section, key)
        if name and (folder / name).exists():
            setattr(section, key, str((folder / name).resolve()))
    file, colon, function = recipe.reward.function.rpartition(":")
    if colon and file.endswith(".py") and (folder / file).is_file():
        recipe.reward.function = f"{(folder / file).resolve()}:{function}"


def resolve_reward(config: RewardConfig) -> Callable[..., Any]:
    """The function that `reward.function` names, with `reward.arguments` bound to it.

    Raises FileNotFoundError or ValueError when it cannot be imported, is not there, or does not take the arguments.
    """
    module_name, colon, name = config.function.rpartition(":")
    if not colon or not module_name or not name:
        raise ValueError(
            f"reward.function is {config.function!r}, expected package.module:function or path/to/file.py:function"
        )
    module = _load_file(Path(module_name)) if module_name.endswith(".py") else _import(module_name)
    function = getattr(module, name, None)
    if not callable(function):
        offered = [known for known in dir(module) if callable(getattr(module, known)) and not known.startswith("_")]
        near = difflib.get_close_matches(name, offered, n=1)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise ValueError(f"reward.function is {config.function!r}: {module_name} has no function {name}{hint}")
    if not config.arguments:
        return function
    try:
        inspect.signature(function).bind_partial(**config.arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"reward.arguments is {config.arguments!r}, but {config.function} {error}") from error
    bound = functools.partial(function, **config.arguments)
    # Name and text only: `__wrapped__` would show the signature in which the bound arguments are still asked for.
    functools.update_wrapper(bound, function)
    del bound.__wrapped__
    return bound


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever the module does when it is imported
        beside = Path(*name.split(".")).with_suffix(".py")
        hint = f"; for the file here write ./{beside}:function" if beside.is_file() else ""
        raise ValueError(f"reward.function: module {name} cannot be imported: {_reason(error)}{hint}") from error


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"reward.function: {path} does not exist")
    # A name of its own shadows no other module; dataclasses look their module up by it.
    spec = importlib.util.spec_from_file_location(f"fastppo_reward_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does when it is imported
        raise ValueError(f"reward.function: {path} cannot be imported: {_reason(error)}") from error
    return module


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {_one_line(error)}"
