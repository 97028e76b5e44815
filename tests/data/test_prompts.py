"""Data sets of every form, the prompts made of them, and those held out."""

from __future__ import annotations

import builtins
import csv
import gzip
import json
import os

import pytest
from tokenizers import Regex, models, normalizers, processors

from fastppo.data import PromptDataset, load_prompts, load_train_and_eval
from fastppo.recipe_config import DataConfig
from tests.data.conftest import spelled

ROWS = [{"question": f"How much is {i}+{i}?", "answer": str(2 * i)} for i in range(6)]
QUESTION = DataConfig(prompt_template="Q: {question}\nA:")


def prompts(source, tokenizer, config=None):
    return load_prompts(source, tokenizer, config)


# Sources


def test_texts(tokenizer):
    dataset = prompts(["one", "two", "one"], tokenizer)
    assert [row["prompt"] for row in dataset] == ["one", "two", "one"] and len(dataset) == 3
    assert spelled(tokenizer, dataset[1]) == ["<s>", *"two"]


def test_rows_keep_their_columns(tokenizer):
    dataset = prompts(ROWS, tokenizer, QUESTION)
    assert dataset[2]["prompt"] == "Q: How much is 2+2?\nA:"
    assert {name: dataset[2][name] for name in ROWS[2]} == ROWS[2]
    assert "prompt" not in ROWS[2]


def test_rows_with_different_columns_are_filled_up(tokenizer):
    dataset = prompts([{"prompt": "a", "level": 1}, {"prompt": "b", "hint": "x"}], tokenizer)
    assert [(row["level"], row["hint"]) for row in dataset] == [(1, None), (None, "x")]


def test_datasets_object(tokenizer):
    datasets = pytest.importorskip("datasets")
    assert [r["answer"] for r in prompts(datasets.Dataset.from_list(ROWS), tokenizer, QUESTION)] == [
        r["answer"] for r in ROWS
    ]
    with pytest.raises(TypeError, match="prompts are DatasetDict, expected"):
        prompts(datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}), tokenizer, QUESTION)


def write(path, rows):
    opened = gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w")
    with opened as file:
        if ".csv" in path.suffixes:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        elif ".json" in path.suffixes:
            json.dump(rows, file)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where the data sets library would leave copies."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "cache"
    for name in ("HF_DATASETS_CACHE", "HF_CACHE_HOME", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, folder / name)
    return folder


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.ndjson", "a.jsonl.gz", "a.json.gz", "a.csv.gz", "odd [1] *name.v2.jsonl"]
)
def test_files(tokenizer, tmp_path, name):
    path = write(tmp_path / name, ROWS)
    dataset = prompts(str(path), tokenizer, QUESTION)
    assert [row["answer"] for row in dataset] == [row["answer"] for row in ROWS]
    assert os.listdir(tmp_path) == [name]
    assert len(prompts(path, tokenizer, QUESTION)) == 6  # a Path does too


def test_parquet(tokenizer, tmp_path, cache):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    assert [row["answer"] for row in prompts(tmp_path / "a.parquet", tokenizer, QUESTION)] == [
        row["answer"] for row in ROWS
    ]
    assert not cache.exists()


def test_a_file_is_read_again_after_it_changed(tokenizer, tmp_path):
    for count in (2, 3):
        assert len(prompts(write(tmp_path / "a.jsonl", ROWS[:count]), tokenizer, QUESTION)) == count


def test_gsm8k(gsm8k_train, tokenizer):
    config = DataConfig(prompt_template="{question}", max_prompt_tokens=200, drop_long_prompts=True)
    rows = load_prompts(gsm8k_train, tokenizer, config)
    assert 3000 < len(rows) < 7473
    assert all("####" in row["answer"] and 1 < len(row["prompt_ids"]) <= 200 for row in rows)


@pytest.mark.parametrize("row", ["a", ["a"], 7, None])
def test_rows_of_a_prompt_dataset_are_dicts(tokenizer, row):
    with pytest.raises(TypeError, match="row 1 is"):
        PromptDataset([{"prompt": "a"}, row], tokenizer, DataConfig())


def test_hub_names(tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def fake(name, config, split):
        asked.append((name, config, split))
        if name == "no/such":
            raise ConnectionError("offline")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    config = DataConfig(prompt_template="{question}", split="test")
    assert len(prompts("openai/gsm8k:main", tokenizer, config)) == len(prompts("imdb", tokenizer, config)) == 6
    assert asked == [("openai/gsm8k", "main", "test"), ("imdb", None, "test")]
    with pytest.raises(ValueError, match="no/such is no file here and cannot be read .* hub: offline"):
        prompts("no/such", tokenizer, config)


@pytest.mark.parametrize(
    "name", ["none.jsonl", "data/none.csv.gz", "./none", "/none", "no hub name", "a/b/c", "~/none.txt/x"]
)
def test_missing_file(tokenizer, name):
    with pytest.raises(ValueError, match="there is no file " + name):
        prompts(name, tokenizer)


def test_unreadable_parquet(tokenizer, tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        prompts(tmp_path / "a.parquet", tokenizer)


def test_without_datasets(tokenizer, tmp_path, monkeypatch):
    real_import = builtins.__import__

    def no_datasets(name, *rest):
        if name == "datasets":
            raise ImportError(name)
        return real_import(name, *rest)

    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setattr(builtins, "__import__", no_datasets)
    for source in (tmp_path / "a.parquet", "openai/gsm8k"):
        with pytest.raises(ImportError, match=r"pip install fastppo\[data\]"):
            prompts(source, tokenizer)
    assert len(prompts(write(tmp_path / "a.jsonl", ROWS), tokenizer, QUESTION)) == len(ROWS)


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ([], ValueError, "the data set is empty"),
        (None, TypeError, "prompts are NoneType"),
        (7, TypeError, "prompts are int"),
        ({"prompt": "a"}, TypeError, "prompts are dict"),
        ((text for text in "ab"), TypeError, "prompts are generator"),
        (["a", 3], TypeError, "row 1 is int"),
        ([{"prompt": "a"}, {1: "b"}], TypeError, "row 1 is dict"),
        (["a", " \n"], ValueError, "the prompt of row 1 is empty"),
        ([{"prompt": "a"}, {"prompt": None}], ValueError, "column 'prompt' of row 1 is NoneType"),
        ([{"prompt": {"a": 1}}], ValueError, "column 'prompt' of row 0 is dict"),
        ([{"prompt": "a", "prompt_ids": [1]}], ValueError, "a column 'prompt_ids'"),
        ([{"prompt": "a", "completions": "b"}], ValueError, "a column 'completions'"),
    ],
)
def test_wrong_sources(tokenizer, source, error, words):
    with pytest.raises(error, match=words):
        prompts(source, tokenizer)


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", ""), ("a.json", "[]"), ("a.csv", "prompt\n")])
def test_a_file_without_rows_is_named(tokenizer, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name} holds no row, expected at least one"):
        prompts(tmp_path / name, tokenizer)


# Token ids


def test_an_added_end_of_sequence_is_taken_off(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert spelled(tokenizer, prompts(["hi"], tokenizer)[0]) == ["<s>", *"hi"]


def test_a_prompt_without_tokens(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("[^ -~]"), "")
    with pytest.raises(ValueError, match="makes no token of the prompt of row 1: 'äöü'"):
        prompts(["a", "äöü"], tokenizer)


def test_a_tokenizer_that_fails(tokenizer):
    tokenizer.backend_tokenizer.model = models.WordLevel({"<s>": 0}, unk_token="none")
    with pytest.raises(ValueError, match="the tokenizer cannot encode the prompt of row 0: WordLevel error"):
        prompts(["a"], tokenizer)


def test_half_a_character(tokenizer):
    """A text that was cut within a character of two halves, which JSON can hold."""
    with pytest.raises(ValueError, match="the tokenizer cannot encode the prompt of row 1"):
        prompts(["a", json.loads(r'"a\ud83d"')], tokenizer)


def test_real_tokenizer(stories_model):
    from fastppo.model import load_tokenizer

    tokenizer = load_tokenizer(str(stories_model))
    row = prompts(["Once upon a time"], tokenizer)[0]
    assert row["prompt_ids"] == [1, 403, 407, 261, 378]


@pytest.mark.parametrize(("limit", "configured"), [(5, None), (None, 5), (9, 5), (5, 12)])
def test_long_prompts(tokenizer, caplog, limit, configured):
    texts = ["1234", "12345", "1", "123456789"]  # one token more with <s>
    config = DataConfig(max_prompt_tokens=configured)
    with pytest.raises(ValueError, match=r"row 1 has 6 tokens, expected at most 5 \(2 of 4 .*drop_long_prompts"):
        prompts(texts, tokenizer, config).limited(limit)
    config.drop_long_prompts = True
    dataset = prompts(texts, tokenizer, config).limited(limit)
    assert [row["prompt"] for row in dataset] == ["1234", "1"]
    assert "prompts: longer than 5 tokens" in caplog.text


def test_a_limit_that_is_known_later(tokenizer):
    rows = [{"prompt": "1"}, {"prompt": "1234"}, {"prompt": "2"}]
    dataset = PromptDataset(rows, tokenizer, DataConfig())
    assert len(dataset.limited(5)) == len(dataset.limited(None)) == 3
    with pytest.raises(ValueError, match="row 1 has 5 tokens, expected at most 4"):
        dataset.limited(4)
    dropping = PromptDataset(rows, tokenizer, DataConfig(drop_long_prompts=True))
    assert [row["prompt"] for row in dropping.limited(4)] == ["1", "2"] and len(dropping) == 3


def test_dropping_must_leave_something(tokenizer):
    with pytest.raises(ValueError, match="all 2 prompts are longer than 3 tokens"):
        prompts(["1234", "123"], tokenizer, DataConfig(drop_long_prompts=True, max_prompt_tokens=3))


@pytest.mark.parametrize("dropped", [0, 1])
def test_tokens_that_the_model_does_not_know(tokenizer, dropped):
    """`add_tokens` without resizing the model killed the run at whatever step the prompt was drawn."""
    known = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    texts = ["long" * 9] * dropped + ["a", "b<new>c"]
    dataset = prompts(texts, tokenizer, DataConfig(drop_long_prompts=True, max_prompt_tokens=9))
    assert len(dataset.limited(None, known + 1)) == len(dataset.limited(None)) == 2
    words = rf"row {1 + dropped} has the token '<new>' with id {known}, expected ids below {known}, .*resize_token_embeddings"
    with pytest.raises(ValueError, match=words):
        dataset.limited(None, known)


# Held-out prompts


def answers(dataset):
    return [row["answer"] for row in dataset]


@pytest.fixture
def data_file(tmp_path):
    return str(write(tmp_path / "train.jsonl", ROWS))


def split(tokenizer, **config):
    return load_train_and_eval(DataConfig(prompt_template="{question}", **config), tokenizer)


def test_no_held_out_prompts(tokenizer, data_file):
    train, held_out = split(tokenizer, path=data_file)
    assert len(train) == 6 and held_out is None


def test_held_out_prompts_are_the_last_and_not_trained_on(tokenizer, data_file):
    train, held_out = split(tokenizer, path=data_file, eval_size=2)
    assert (answers(train), answers(held_out)) == (["0", "2", "4", "6"], ["8", "10"])


def test_held_out_prompts_of_their_own_file(tokenizer, data_file, tmp_path):
    eval_path = str(write(tmp_path / "eval.csv.gz", ROWS[:4]))
    train, held_out = split(tokenizer, path=data_file, eval_path=eval_path, eval_size=3)
    assert (len(train), answers(held_out)) == (6, ["0", "2", "4"])
    with pytest.raises(ValueError, match="eval_size is 5, expected at most 4"):
        split(tokenizer, path=data_file, eval_path=eval_path, eval_size=5)


def test_held_out_prompts_of_their_own_split(tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")
    splits = {"train": ROWS, "test": ROWS[:2]}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: datasets.Dataset.from_list(splits[split]))
    train, held_out = split(tokenizer, path="openai/gsm8k:main", eval_split="test", eval_size=2)
    assert (len(train), answers(held_out)) == (6, ["0", "2"])
    with pytest.raises(ValueError, match="eval_size is 3, expected at most 2, the number of rows in openai/gsm8k:main"):
        split(tokenizer, path="openai/gsm8k:main", eval_split="test", eval_size=3)


def test_a_file_has_no_splits_to_hold_out(tokenizer, data_file):
    """Its own rows would be trained on and evaluated on."""
    with pytest.raises(ValueError, match="eval_split is 'test', but .*train.jsonl is a file, which has no splits"):
        split(tokenizer, path=data_file, eval_split="test", eval_size=2)


def test_wrong_splits(tokenizer, data_file):
    with pytest.raises(ValueError, match="path is empty"):
        split(tokenizer)
    with pytest.raises(ValueError, match="eval_size is 6, expected less than 6"):
        split(tokenizer, path=data_file, eval_size=6)


def test_held_out_rows_are_counted_as_in_their_file(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [*ROWS, {"question": "x" * 50, "answer": "0"}])
    with pytest.raises(ValueError, match="row 6 has 51 tokens"):
        split(tokenizer, path=str(path), eval_size=2, max_prompt_tokens=30)
