"""Regular expressions and JSON schemas."""

from __future__ import annotations

import sys
from functools import partial

import pytest

from fastppo.rewards import RewardRunner, json_schema, regex
from tests.rewards.conftest import assert_all_invalid

SCHEMA = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}, "age": {"minimum": 0}}}


@pytest.mark.parametrize(
    ("pattern", "text", "score"),
    [
        (r"\d+", "it is 42", 1.0),
        (r"\A\d+\Z", "it is 42", 0.0),
        (r"(?s)\Aa.*b\Z", "a\n\nb", 1.0),
        (r"\d", "", 0.0),
        ("", "", 1.0),
    ],
)
def test_regex(pattern, text, score):
    assert regex([text], pattern=pattern) == [score]


@pytest.mark.parametrize("pattern", ["(", "*", r"\g<1", 3, None, ["a"]])
def test_a_wrong_pattern_is_named_when_the_runner_is_made(pattern):
    with pytest.raises(ValueError, match="reward 'regex': pattern is .*, expected a regular expression"):
        RewardRunner(partial(regex, pattern=pattern), timeout=None)


def test_a_pattern_without_end_is_invalid_not_zero(make):
    result = make(partial(regex, pattern=r"\A(a+)+\Z"), 0.5, retries=0)(["p"] * 3, ["a" * 60 + "b"] * 3, {})
    assert_all_invalid(result, "no answer within 0.5 s")


def test_an_option_is_never_taken_from_the_data(make):
    """A column may have an option's name: what is bound stands, and what is not bound keeps its default or is asked for."""
    runner = make(partial(regex, pattern="a"), None)
    assert runner(["p"], ["a"], {"pattern": ["b"]}).scores == [1.0]
    with pytest.raises(ValueError, match="reward 'regex' needs pattern: bind it"):
        make(regex, None)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"name": "Ada", "age": 36}', 1.0),
        ('\n {"name": "Ada"} ', 1.0),
        ('{"name": 3}', 0.0),
        ('{"name": "Ada", "age": -1}', 0.0),
        ("[]", 0.0),
        ('{"name": "Ada"', 0.0),
        ('Here: {"name": "Ada"}', 0.0),
        ('{"name": "Ada", "age": NaN}', 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
        ("9" * 10_000, 0.0),
    ],
    ids=lambda value: str(value)[:20],
)
def test_json_schema(text, score):
    pytest.importorskip("jsonschema", reason="pip install fastppo[json-schema]")
    assert json_schema([text], schema=SCHEMA) == [score]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "objekt"}, r"schema\['type'\] is 'objekt', expected a JSON schema"),
        ({"properties": {"a": {"minimum": "0"}}}, r"schema\['properties'\]\['a'\]\['minimum'\] is '0'"),
        ("{}", "schema is '{}', expected a mapping"),
    ],
)
def test_a_wrong_schema_is_named_when_the_runner_is_made(schema, message):
    pytest.importorskip("jsonschema", reason="pip install fastppo[json-schema]")
    with pytest.raises(ValueError, match=f"reward 'json_schema': {message}"):
        RewardRunner(partial(json_schema, schema=schema), timeout=None)


def test_a_reference_to_elsewhere_is_not_fetched(make):
    pytest.importorskip("jsonschema", reason="pip install fastppo[json-schema]")
    schema = {"$ref": "http://127.0.0.1:9/schema.json"}
    result = make(partial(json_schema, schema=schema), None, retries=0)(["p"] * 3, ["{}"] * 3, {})
    assert_all_invalid(result, "Unresolvable")


def test_without_jsonschema(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(ImportError, match=r"json_schema.* needs? .*pip install fastppo\[json-schema\]"):
        RewardRunner(partial(json_schema, schema={}), timeout=None)
