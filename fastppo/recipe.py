"""Recipe files: YAML that maps one to one on `fastppo.config.Recipe`, with overrides from the command line."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Hashable
from pathlib import Path
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
            key = self.construct_object(key_node, deep=deep)
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
        settings = yaml.load(path.read_text(), _UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"recipe {path} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"recipe {path} is {type(settings).__name__}, expected sections: {', '.join(SECTIONS)}")
    for section, values in settings.items():
        _check_name(str(section), SECTIONS, f"recipe {path}: section")
        if not isinstance(values, dict):
            raise ValueError(f"recipe {path}: {section} is {values!r}, expected keys and values")
        for key in values:
            _check_name(str(key), KEYS[section], f"recipe {path}: key {section}.", joined=True)
    return settings


def _check_name(name: str, known: Any, what: str, *, joined: bool = False) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
        raise ValueError(f"{what}{'' if joined else ' '}{name} is not known; the nearest is {near}")


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
    _check_name(key, KEYS[section], f"override: key {section}.", joined=True)
    try:
        return section, key, yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not valid YAML: {error}") from error


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
    """The function that `reward.function` names, with `reward.arguments` bound to it."""
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
    bound = functools.partial(function, **config.arguments)
    return functools.update_wrapper(bound, function)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"reward.function: module {name} cannot be imported: {error}") from error


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"reward.function: {path} does not exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
