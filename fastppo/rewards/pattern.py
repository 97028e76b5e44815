"""Does a completion have a given form: a regular expression, or JSON of a schema?"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from fastppo.rewards.text import text_of


def regex(completions: list, *, pattern: str, **columns: Any) -> list[float]:
    r"""1.0 where `pattern` is found in the completion, else 0.0. `\A...\Z` asks for the whole of it, `(?s)` lets dots match line breaks.

    Raises ValueError for a pattern that Python's `re` does not take.
    """
    try:
        search = re.compile(pattern).search
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"pattern is {pattern!r}, expected a regular expression: {error}") from error
    return [float(search(text_of(completion)) is not None) for completion in completions]


def json_schema(completions: list, *, schema: Mapping[str, Any], **columns: Any) -> list[float]:
    """1.0 where the whole completion is JSON that fits `schema` (JSON Schema, of the draft that `$schema` names or the latest), else 0.0.

    NaN and Infinity are no JSON. A `$ref` stays inside the schema: nothing is fetched.

    Raises ImportError where jsonschema is missing, ValueError for what is no schema.
    """
    validator = _validator(schema)
    return [float(_fits(text_of(completion), validator)) for completion in completions]


def _validator(schema: Any) -> Any:
    try:
        import jsonschema
        import referencing
    except ImportError as error:
        raise ImportError("the json_schema reward needs jsonschema: pip install fastppo[json-schema]") from error
    if not isinstance(schema, Mapping):
        raise ValueError(f"schema is {schema!r}, expected a mapping: {{type: object, ...}}")
    cls = jsonschema.validators.validator_for(schema, default=jsonschema.validators.Draft202012Validator)
    try:
        cls.check_schema(schema)
    except jsonschema.SchemaError as error:
        where = "".join(f"[{part!r}]" for part in error.absolute_path)
        raise ValueError(f"schema{where} is {error.instance!r}, expected a JSON schema: {error.message}") from error
    return cls(schema, registry=referencing.Registry())


def _fits(text: str, validator: Any) -> bool:
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        return validator.is_valid(value)
    except (ValueError, RecursionError):  # no JSON, or nested deeper than anything that is read
        return False


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
