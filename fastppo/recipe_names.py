"""The names of a recipe's settings: which there are, and, for one that there is not, where it belongs or what is nearest."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any, NoReturn

from fastppo.config import MOVED, moved_to

OLD_SECTION = "ppo"


class Names:
    """Of the recipes that map on the dataclass `recipe`: `sections` (name -> dataclass), `keys` (section -> names), `run_keys` (at the top level)."""

    def __init__(self, recipe: type) -> None:
        fields = dataclasses.fields(recipe)
        self.recipe = recipe
        self.sections = {f.name: f.default_factory for f in fields if isinstance(f.default_factory, type)}
        self.keys = {name: [key.name for key in dataclasses.fields(section)] for name, section in self.sections.items()}
        self.run_keys = [f.name for f in fields if f.name not in self.sections]

    def check_section(self, name: str, values: Any, where: str) -> None:
        """Raises ValueError unless `values` may stand under `name`, as keys and values that are known."""
        if name not in self.sections:
            self.refuse(name, values, where)
        if not isinstance(values, dict):
            raise ValueError(f"{where}: {name} is {values!r}, expected keys and values{self._moved_hint(name)}")
        for key in values:
            self._check_key(name, str(key), where)

    def resolve(self, name: str, where: str) -> tuple[str, str]:
        """(section or "", key) of "section.key", of a run key, or of a key that one section alone has. Raises ValueError."""
        section, dot, key = name.rpartition(".")
        if dot:
            if section == OLD_SECTION:
                self._refuse_old_keys([key], where)
            if section not in self.sections:
                self.refuse(section, {}, where)
            self._check_key(section, key, where)
            return section, key
        if key in self.run_keys:
            return "", key
        if key in self.sections:
            raise ValueError(f"{where}: {key} is a section, expected {key}.key=value{self._moved_hint(key)}")
        owners = self._owners(key)
        if not owners:
            self._refuse_bare_key(key, where)
        if len(owners) > 1:
            raise ValueError(f"{where}: several sections have {key}; write {' or '.join(owners)}")
        return owners[0].partition(".")[0], key

    def kinds(self, section: str, key: str) -> set[type]:
        """The types that a setting may have; a choice of texts is a text."""
        kind = typing.get_type_hints(self.sections[section] if section else self.recipe)[key]
        members = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
        return {type(typing.get_args(m)[0]) if typing.get_origin(m) is typing.Literal else m for m in members}

    def refuse_booleans(self, settings: dict[str, Any]) -> None:
        """`lr: yes` is a slip of the pen, but Python, and so pydantic, takes True for the number 1."""
        _refuse_booleans({key: settings[key] for key in self.run_keys if key in settings}, self.recipe, "")
        for name, section in self.sections.items():
            _refuse_booleans(settings.get(name, {}), section, f"{name}.")

    def refuse(self, name: str, values: Any, where: str) -> NoReturn:
        """A name at the top level that is neither a section nor a run key: where it belongs, or what is nearest."""
        if name == OLD_SECTION and isinstance(values, dict) and values:
            self._refuse_old_keys(list(map(str, values)), where)
        if isinstance(values, dict):
            near = difflib.get_close_matches(name, self.sections, n=1, cutoff=0.0)[0]
            raise ValueError(f"{where}: section {name} is not known; the nearest is {near}")
        self._refuse_bare_key(name, where)

    def _refuse_old_keys(self, keys: list[str], where: str) -> NoReturn:
        """Keys under `ppo`, the one section that all of PPO's settings used to stand in: where each stands now."""
        places = {key: key if key in self.run_keys else self._moved_to(key) for key in keys}
        news = [
            f"is now {place}" if place else f"is not known; the nearest is {self._nearest(key)}"
            for key, place in places.items()
        ]
        raise ValueError(
            f"{where}: " + "; ".join(f"{OLD_SECTION}.{key} {new}" for key, new in zip(keys, news, strict=True))
        )

    def _refuse_bare_key(self, key: str, where: str) -> NoReturn:
        """A key without a section that is no run key."""
        hint = self._elsewhere(key) or f"the nearest is {self._nearest(key)}"
        raise ValueError(f"{where}: key {key} is not known; {hint}")

    def _check_key(self, section: str, key: str, where: str) -> None:
        if key not in self.keys[section]:
            near = difflib.get_close_matches(key, self.keys[section], n=1, cutoff=0.0)[0]
            hint = self._elsewhere(key) or f"the nearest is {near}"
            raise ValueError(f"{where}: key {section}.{key} is not known; {hint}")

    def _elsewhere(self, key: str) -> str:
        """Such as "optimizer.lr is", where other places have the key, or had it under this name; "" where none has."""
        names = [key] if key in self.run_keys else self._owners(key) or [n for n in [self._moved_to(key)] if n]
        return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'}" if names else ""

    def _moved_to(self, key: str) -> str | None:
        """Where a key of before stands now, if it is one of these names."""
        section, _, now = (moved_to(key) or "").partition(".")
        return f"{section}.{now}" if now in self.keys.get(section, ()) else None

    def _owners(self, key: str) -> list[str]:
        """section.key of every section that has the key."""
        return [f"{section}.{key}" for section, keys in self.keys.items() if key in keys]

    def _nearest(self, key: str) -> str:
        """The run key, or section.key, whose own name is nearest."""
        known = {name: name for name in self.run_keys}
        for section, keys in self.keys.items():
            known |= {name: f"{section}.{name}" for name in keys if name not in known}
        return known[difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]]

    def _moved_hint(self, section: str) -> str:
        """`critic: shared` was a key before it became a section."""
        return f" ({section} is now {MOVED[section]})" if section in MOVED else ""


def _refuse_booleans(values: dict[str, Any], owner: type, prefix: str) -> None:
    hints = typing.get_type_hints(owner)
    for key, value in values.items():
        if isinstance(value, bool) and bool not in (hints[key], *typing.get_args(hints[key])):
            raise ValueError(f"{prefix}{key} is {value!r}: expected no true or false")
