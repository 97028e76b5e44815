"""Data sets of every form and format, and the prompts made of them."""

from __future__ import annotations

import builtins
import csv
import gzip
import json
import os

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fastppo.config import DataConfig
from fastppo.data import PromptDataset, load_prompts, load_train_and_eval

ROWS = [{"question": f"How much is {i}+{i}?", "answer": str(2 * i)} for i in range(6)]
QUESTION = DataConfig(prompt_template="Q: {question}\nA:")
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'alien' %}{{ raise_exception('no aliens') }}{% endif %}"
    "{{ '<s>' if loop.first else '' }}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def tokenizer():
    """One token a character, `<s>` before every text."""
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *map(chr, range(32, 127)), "\n"])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def prompts(source, tokenizer, config=None, limit=None):
    return load_prompts(source, tokenizer, config or DataConfig(), limit)


def spelled(tokenizer, row):
    return tokenizer.convert_ids_to_tokens(row["prompt_ids"])


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
def test_files(tokenizer, tmp_path, cache, name):
    path = write(tmp_path / name, ROWS)
    dataset = prompts(str(path), tokenizer, QUESTION)
    assert [str(row["answer"]) for row in dataset] == [row["answer"] for row in ROWS]
    assert not cache.exists() and os.listdir(tmp_path) == [name]
    assert len(prompts(path, tokenizer, QUESTION)) == 6  # a Path does too


def test_parquet(tokenizer, tmp_path, cache):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    assert [row["answer"] for row in prompts(tmp_path / "a.parquet", tokenizer, QUESTION)] == [
        row["answer"] for row in ROWS
    ]
    assert not cache.exists()


def test_a_file_is_read_again_after_it_changed(tokenizer, tmp_path):
    pytest.importorskip("datasets")
    for count in (2, 3):
        assert len(prompts(write(tmp_path / "a.jsonl", ROWS[:count]), tokenizer, QUESTION)) == count


def test_gsm8k(gsm8k_train, tokenizer):
    pytest.importorskip("datasets")
    rows = load_prompts(gsm8k_train, tokenizer, DataConfig(prompt_template="{question}", drop_long_prompts=True), 200)
    assert 3000 < len(rows) < 7473
    assert all("####" in row["answer"] and 1 < len(row["prompt_ids"]) <= 200 for row in rows)


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


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"prompt": "x"}\n{oops\n', "cannot be read as json"),
        ("a.jsonl.gz", b"not gzipped", "cannot be read as json"),
        ("a.parquet", b"not parquet", "cannot be read as parquet"),
        ("a.parquet.gz", b"x", "unknown format"),
        ("a.txt", b"x", "unknown format"),
        ("a.jsonl", b"", "the data set is empty"),
        ("a.json", b"[]", "no data"),
    ],
)
def test_unreadable_file(tokenizer, tmp_path, name, content, words):
    pytest.importorskip("datasets")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        prompts(tmp_path / name, tokenizer)


def test_without_datasets(tokenizer, tmp_path, monkeypatch):
    real_import = builtins.__import__

    def no_datasets(name, *rest):
        if name == "datasets":
            raise ImportError(name)
        return real_import(name, *rest)

    path = write(tmp_path / "a.jsonl", ROWS)
    monkeypatch.setattr(builtins, "__import__", no_datasets)
    with pytest.raises(ImportError, match=r"pip install fastppo\[data\]"):
        prompts(path, tokenizer)


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


# Templates


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{question}", "How much is 1+1?"),
        ("{{{answer}}} {question} {answer}", "{2} How much is 1+1? 2"),
        ("Say hi.", "Say hi."),
        ("{final answer}", "two"),
    ],
)
def test_template(tokenizer, template, text):
    rows = [{**ROWS[1], "final answer": "two"}]
    assert prompts(rows, tokenizer, DataConfig(prompt_template=template))[0]["prompt"] == text


def test_braces_in_the_data_are_left_alone(tokenizer):
    assert prompts(["{answer} {0.__class__}"], tokenizer)[0]["prompt"] == "{answer} {0.__class__}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{prompt}", r"names the column 'prompt', expected one of the data's: 'question', 'answer'"),
        ("{qestion}", r"'qestion' \(did you mean {question}\?\)"),
        ("{question.__class__}", "names the column 'question.__class__'"),
        ("{question[0]}", r"names the column 'question\[0\]'"),
        ("{question!r}", "expected plain fields"),
        ("{question:>10}", "expected plain fields"),
        ("{}", "expected plain fields"),
        ("{question", "prompt_template is '{question'"),
        ("a } b", "prompt_template is 'a } b'"),
    ],
)
def test_wrong_templates(tokenizer, template, words):
    with pytest.raises(ValueError, match=words):
        prompts(ROWS, tokenizer, DataConfig(prompt_template=template))


# Chat


def test_texts_go_through_the_chat_template_where_there_is_one(chat_tokenizer):
    row = prompts(["hi"], chat_tokenizer, DataConfig(system_prompt="Be brief."))[0]
    assert "".join(spelled(chat_tokenizer, row)) == "<s>[system]Be brief.[user]hi[assistant]"
    assert row["prompt_ids"].count(chat_tokenizer.bos_token_id) == 1
    assert row["prompt"] == "hi"


def test_chat_off(chat_tokenizer):
    row = prompts(["hi"], chat_tokenizer, DataConfig(chat=False))[0]
    assert spelled(chat_tokenizer, row) == ["<s>", *"hi"]


@pytest.mark.parametrize("template", ["{prompt}", "{talk}"])
def test_conversations(chat_tokenizer, template):
    talk = [
        {"role": "user", "content": "hi", "name": None},  # what a table fills in
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "bye"},
    ]
    row = prompts([{template[1:-1]: talk, "answer": "x"}], chat_tokenizer, DataConfig(prompt_template=template))[0]
    assert "".join(spelled(chat_tokenizer, row)) == "<s>[user]hi[assistant]yes?[user]bye[assistant]"
    assert row["prompt"] == [{"role": "user", "content": "hi"}, *talk[1:]] and row["answer"] == "x"


def test_system_prompt_comes_first(chat_tokenizer):
    row = prompts([[{"role": "user", "content": "hi"}]], chat_tokenizer, DataConfig(system_prompt="Be brief."))[0]
    assert "".join(spelled(chat_tokenizer, row)) == "<s>[system]Be brief.[user]hi[assistant]"
    assert row["prompt"] == user("hi")


def user(text):
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("source", "config", "error", "words"),
    [
        ([user("hi")], {"chat": False}, ValueError, "row 0 is a conversation, expected a text because chat is off"),
        (["hi"], {"chat": False, "system_prompt": "x"}, ValueError, "system_prompt is set, but no chat template"),
        (
            [[{"role": "system", "content": "a"}, *user("b")]],
            {"system_prompt": "x"},
            ValueError,
            "a system message of its own",
        ),
        (
            [user("hi"), [*user("a"), {"role": "assistant", "content": "b"}]],
            {},
            ValueError,
            "row 1 ends with the assistant's turn",
        ),
        ([[]], {}, ValueError, "row 0 is a conversation without messages"),
        ([["hi"]], {}, ValueError, "row 0 has the message 'hi'"),
        ([[{"role": "user", "content": None}]], {}, ValueError, "expected a dict with texts 'role' and 'content'"),
        ([[{"role": "alien", "content": "x"}]], {}, ValueError, "chat template refuses the prompt of row 0: no aliens"),
        ([user("hi"), "hi"], {}, ValueError, r"two kinds, a conversation \(row 0\) and a text \(row 1\)"),
    ],
)
def test_wrong_conversations(chat_tokenizer, source, config, error, words):
    with pytest.raises(error, match=words):
        prompts(source, chat_tokenizer, DataConfig(**config))


def test_a_tokenizer_without_a_chat_template(tokenizer):
    with pytest.raises(
        ValueError, match="row 0 is a conversation, expected a text because the tokenizer has no chat template"
    ):
        prompts([user("hi")], tokenizer)
    with pytest.raises(ValueError, match="chat is true, but the tokenizer has no chat template"):
        prompts(["hi"], tokenizer, DataConfig(chat=True))
    with pytest.raises(ValueError, match="system_prompt is set"):
        prompts(["hi"], tokenizer, DataConfig(system_prompt="x"))


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
    with pytest.raises(ValueError, match="the tokenizer cannot encode the prompts: WordLevel error"):
        prompts(["a"], tokenizer)


def test_real_tokenizer(stories_model):
    from fastppo.model import load_tokenizer

    tokenizer = load_tokenizer(str(stories_model))
    row = prompts(["Once upon a time"], tokenizer)[0]
    assert row["prompt_ids"] == [1, 403, 407, 261, 378]


@pytest.mark.parametrize(("limit", "configured"), [(5, None), (None, 5), (9, 5), (5, 9)])
def test_long_prompts(tokenizer, caplog, limit, configured):
    texts = ["1234", "12345", "1", "123456789"]  # one token more with <s>
    config = DataConfig(max_prompt_tokens=configured)
    with pytest.raises(ValueError, match=r"row 1 has 6 tokens, expected at most 5 \(2 of 4 .*drop_long_prompts"):
        prompts(texts, tokenizer, config, limit)
    config.drop_long_prompts = True
    dataset = prompts(texts, tokenizer, config, limit)
    assert [row["prompt"] for row in dataset] == ["1234", "1"]
    assert "left out 2 of 4 prompts: longer than 5 tokens" in caplog.text


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
        prompts(["1234", "123"], tokenizer, DataConfig(drop_long_prompts=True), 3)


# Held-out prompts


def answers(dataset):
    return [str(row["answer"]) for row in dataset]


@pytest.fixture
def data_file(tmp_path):
    pytest.importorskip("datasets")
    return str(write(tmp_path / "train.jsonl", ROWS))


def split(tokenizer, limit=None, **config):
    return load_train_and_eval(DataConfig(prompt_template="{question}", **config), tokenizer, limit)


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
    pytest.importorskip("datasets")
    path = write(tmp_path / "a.jsonl", [*ROWS, {"question": "x" * 50, "answer": "0"}])
    with pytest.raises(ValueError, match="row 6 has 51 tokens"):
        split(tokenizer, 30, path=str(path), eval_size=2)
