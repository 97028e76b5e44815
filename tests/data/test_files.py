"""What stands in a file arrives as it stands; what cannot be read is named with its line."""

from __future__ import annotations

import gzip
import json

import pytest

from fastppo.data.sources import rows_of
from fastppo.recipe_config import DataConfig


def rows(path, **config):
    return rows_of(str(path), DataConfig(**config))


def save(path, content, encoding="utf-8"):
    content = content.encode(encoding) if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


# Each of these was turned into a number, a date, a truth value or None on its way in (revision ebea849).
TEXTS = [
    "NA",
    "None",
    "null",
    "nan",
    "02108",
    "1e5",
    "true",
    "12345678901234567890123",
    "3.0",
    "3.10",
    "2024-01-02",
    "",
    " x ",
]
TEXTS += [
    "00:30",
    "1/2",
    "inf",
    "-0",
    "+1",
    "1_000",
    "N/A",
    'a "quoted" word',
    "two\nlines",
    "two\r\nlines",
    "semi;colon",
    "com,ma",
    "ä€😀",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv", "a.tsv.gz", "A.CSV"])
def test_csv_values_stay_the_texts_they_are(tmp_path, name, text):
    separator = "\t" if "tsv" in name else ","
    quoted = '"' + text.replace('"', '""') + '"'
    lines = [separator.join(["prompt", "answer"]), separator.join(["p", quoted]), separator.join(["q", "7"])]
    path = save(tmp_path / name, "\n".join(lines))
    assert rows(path) == [{"prompt": "p", "answer": text}, {"prompt": "q", "answer": "7"}]


VALUES = [
    3,
    0.5,
    3.0,
    12345678901234567890123,
    True,
    None,
    "2024-01-02",
    "2024-01-02T03:04:05Z",
    "NA",
    "02108",
    "",
    [],
    {},
]
VALUES += [
    [1, 2.5, "x", None],
    {"a": {"b": [1, {"c": 2.0}]}},
    [[1], ["a"]],
    "ä\u2028\u0085\x1e",
    1e-300,
    -0.0,
    float("inf"),
    float("nan"),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_json_keeps_each_value_and_its_type_whatever_the_other_rows_have(tmp_path, name, value):
    items = [{"prompt": "p", "x": other} for other in (1, value, "text", 0.25, value)] + [{"prompt": "p"}]
    lines = [json.dumps(item, ensure_ascii=False) for item in items]
    path = save(
        tmp_path / name,
        "[" + ", ".join(lines) + "]" if name.startswith("a.json") and "jsonl" not in name else "\n".join(lines),
    )
    assert [repr(row) for row in rows(path)] == [repr(item) for item in items]


def test_json_lines_in_a_json_file_and_rows_that_are_texts_or_conversations(tmp_path):
    talk = [{"role": "user", "content": "hi"}]
    lines = "\n".join(json.dumps(item) for item in [{"prompt": "a"}, {"prompt": talk}])
    assert rows(save(tmp_path / "a.json", lines)) == [{"prompt": "a"}, {"prompt": talk}]
    assert rows(save(tmp_path / "b.json", json.dumps(["a", talk]))) == [{"prompt": "a"}, {"prompt": talk}]
    assert rows(save(tmp_path / "c.jsonl", '"a"\n' + json.dumps(talk))) == [{"prompt": "a"}, {"prompt": talk}]


@pytest.mark.parametrize("first", [None, 7, "absent"])
def test_a_large_file_whose_later_rows_have_other_types(tmp_path, first):
    """Over ten megabytes: readers of tables settle the types by the first part."""
    early = json.dumps({"prompt": "x" * 1000} | ({} if first == "absent" else {"level": first}))
    path = save(tmp_path / "a.jsonl", (early + "\n") * 11_000 + '{"prompt": "y", "level": "late"}\n')
    found = rows(path)
    assert path.stat().st_size > 10 * 2**20 and len(found) == 11_001 and found[-1] == {"prompt": "y", "level": "late"}
    assert found[0].get("level", "absent") == first


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("last", ["", "\n", "\n\n\n"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_line_ends_byte_order_marks_and_empty_lines(tmp_path, name, end, mark, last):
    text = {
        "a.csv": 'prompt,answer\np,"7"\n\nq,8',
        "a.jsonl": '{"prompt": "p", "answer": "7"}\n\n{"prompt": "q", "answer": "8"}',
        "a.json": '[{"prompt": "p", "answer": "7"},\n\n{"prompt": "q", "answer": "8"}]',
    }[name]
    path = save(tmp_path / name, (mark + text + last).replace("\n", end))
    assert rows(path) == [{"prompt": "p", "answer": "7"}, {"prompt": "q", "answer": "8"}]


@pytest.mark.parametrize(
    ("name", "separator"), [("a.csv", ","), ("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t"), ("a.tsv.gz", "\t")]
)
def test_separators(tmp_path, name, separator):
    others = ",;\t".replace(separator, "")
    lines = [["prompt", '"a,b"', "c"], [f"1{others}2", "x", ""], ['";,\t"', "", "z"]]
    path = save(tmp_path / name, "\n".join(map(separator.join, lines)))
    first = {"prompt": f"1{others}2", "a,b": "x", "c": ""}
    assert rows(path) == [first, {"prompt": ";,\t", "a,b": "", "c": "z"}]


def test_long_fields_and_one_column(tmp_path):
    assert rows(save(tmp_path / "a.csv", "prompt\n" + "x" * 300_000)) == [{"prompt": "x" * 300_000}]


def test_nothing_of_the_datasets_package_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr("fastppo.data.sources._datasets", lambda: pytest.fail("asked for datasets"))
    for name, text in (("a.csv", "prompt\np"), ("a.jsonl", '{"prompt": "p"}'), ("a.json", '[{"prompt": "p"}]')):
        assert rows(save(tmp_path / name, text)) == [{"prompt": "p"}]


WRONG = [
    ("a.csv", "a,b\n1,2\n1,2,3\n", r"a.csv, line 3 has 3 fields, expected 2 as in the header"),
    ("a.csv", "a,b\n1,2,3\n", r"line 2 has 3 fields, expected 2"),
    ("a.csv", 'a,b\n"1\n\n2",3\n1\n', r"line 5 has 1 fields, expected 2"),
    ("a.csv", "a;b\n1;2\n\n1;2;3\n", r"line 4 has 3 fields, expected 2 .*';'"),
    ("a.tsv", "a\tb\n1,2\n", r"line 2 has 1 fields, expected 2"),
    ("a.csv", "a,b,a\n1,2,3\n", r"line 1: the header names 'a' twice"),
    ("a.csv", 'a\n"open\nend\n', r"line 2: unexpected end of data"),
    ("a.csv", 'a\nx\n"b"c\n', r"line 3: "),
    ("a.csv", "a\nx\né\n".encode("latin-1"), r"line 3 is not UTF-8 \(byte 0xe9\)"),
    ("a.csv", "a\nx\n".encode("utf-16"), r"line 1 is not UTF-8"),
    ("a.jsonl", '{"a": 1}\n{oops\n', r"a.jsonl, line 2: "),
    ("a.jsonl", '{"a": 1}\n\n{"a": 1} {"a": 2}\n', r"line 3: Extra data"),
    ("a.jsonl", '{\n"a": 1}\n', r"line 1: "),
    ("a.jsonl", '{"a": 1}\n{"a": 1, "b": {"c": 1, "c": 2}}\n', r"line 2: the key 'c' stands twice"),
    ("a.jsonl", '{"a": 1}\n7\n', r"a.jsonl, line 2 is int, expected a text, a conversation or a dict"),
    ("a.jsonl", '{"a": 1}\nnull\n', r"line 2 is NoneType"),
    ("a.jsonl", '{"a": 1}\n{"a": "é"}'.encode("latin-1"), r"line 2 is not UTF-8 \(byte 0xe9\)"),
    ("a.jsonl", '{"a": 1}\n' + "[" * 100_000, r"line 2: it is nested too deeply"),
    ("a.jsonl", '{"a": ' + "1" * 5000 + "}", r"line 1: Exceeds the limit"),
    ("a.json", '[{"a": 1},\n{"a": 2}\n{"a": 3}]', r"a.json, line 3: "),
    ("a.json", '[{"a": 1},\n{"a": 2}]\nx', r"line 3: Extra data"),
    ("a.json", '[{"a": 1}, {"a": 1, "a": 2}]', r"a.json: the key 'a' stands twice in {'a': 2}"),
    ("a.json", '[{"a": 1}, 7]', r"a.json, row 1 is int"),
    ("a.json", '{\n "a": 1\n}', r"line 1: .*expected one JSON value"),
    ("a.jsonl.gz", None, r"a.jsonl.gz cannot be read: .*gzip"),
    ("a.txt", "x", "unknown format"),
    ("a.parquet.gz", "x", "unknown format"),
]


@pytest.mark.parametrize(("name", "content", "words"), WRONG)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(b"not gzipped") if content is None else save(path, content)
    with pytest.raises((ValueError, TypeError), match=words):
        rows(path)


def test_a_compressed_file_that_breaks_off(tmp_path):
    whole = gzip.compress(b'{"prompt": "p"}\n' * 10_000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="a.jsonl.gz cannot be read"):
        rows(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_files_without_rows(tmp_path, name, content):
    files = [(name, content), ("header.csv", "prompt,answer\n"), ("b.json", "[]")]
    for path in (save(tmp_path / name, content) for name, content in files):
        with pytest.raises(ValueError, match=rf"{path.name} holds no row, expected at least one"):
            rows(path)


# Declared columns


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("int", "02108", 2108),
        ("int", " -7 ", -7),
        ("int", "12345678901234567890123", 12345678901234567890123),
        ("int", "", None),
        ("float", "1e5", 100000.0),
        ("float", "3", 3.0),
        ("float", " ", None),
        ("bool", "true", True),
        ("bool", "False", False),
        ("bool", "", None),
        ("json", '{"a": [1, 0.5]}', {"a": [1, 0.5]}),
        ("json", "null", None),
    ],
)
def test_declared_columns(tmp_path, kind, text, value):
    quoted = '"' + text.replace('"', '""') + '"'
    from_csv = rows(save(tmp_path / "a.csv", f"prompt,x\np,{quoted}\n"), columns={"x": kind})
    from_json = rows(save(tmp_path / "a.jsonl", json.dumps({"prompt": "p", "x": text})), columns={"x": kind})
    from_memory = rows_of([{"prompt": "p", "x": text}], DataConfig(columns={"x": kind}))
    assert repr(from_csv) == repr(from_json) == repr(from_memory) == repr([{"prompt": "p", "x": value}])


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("int", 3, 3),
        ("float", 3, 3.0),
        ("float", 0.5, 0.5),
        ("bool", True, True),
        ("json", [1], [1]),
        ("int", None, None),
    ],
)
def test_values_that_are_what_they_are_declared_as(kind, value, expected):
    found = rows_of([{"prompt": "p", "x": value}, {"prompt": "q"}], DataConfig(columns={"x": kind}))
    assert repr(found) == repr([{"prompt": "p", "x": expected}, {"prompt": "q"}])


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("int", "3.0", "is '3.0', expected an integer"),
        ("int", "1_000", "expected an integer"),
        ("int", "NA", "expected an integer"),
        ("int", "٣", "expected an integer"),
        ("int", 3.0, "is 3.0, expected an integer"),
        ("int", True, "is True, expected an integer"),
        ("float", "1_0", "expected a number"),
        ("float", True, "expected a number"),
        ("bool", "yes", "expected true or false"),
        ("bool", 1, "expected true or false"),
        ("json", "{oops", "expected JSON as declared in columns: Expecting property name"),
        ("json", '{"a": 1, "a": 2}', "the key 'a' stands twice"),
    ],
)
def test_values_that_are_not_what_they_are_declared_as(tmp_path, kind, value, words):
    path = save(tmp_path / "a.jsonl", '{"prompt": "p"}\n' + json.dumps({"prompt": "p", "x": value}))
    with pytest.raises(ValueError, match=f"a.jsonl, line 2: column 'x' .*{words}"):
        rows(path, columns={"x": kind})
    with pytest.raises(ValueError, match="row 0: column 'x'"):
        rows_of([{"prompt": "p", "x": value}], DataConfig(columns={"x": kind}))


def test_declared_columns_that_are_not_there():
    with pytest.raises(
        ValueError,
        match=r"columns declares 'levl' \(did you mean 'level'\?\), expected one of the data's: 'level', 'prompt'",
    ):
        rows_of([{"prompt": "p", "level": "3"}], DataConfig(columns={"levl": "int"}))
    with pytest.raises(ValueError, match="columns.level"):
        DataConfig(columns={"level": "integer"})
