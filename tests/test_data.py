"""Prompts: every file format and shape of row, chat templates, limits; and the sampler's order."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastppo.config import DataConfig
from fastppo.data import PromptSampler, load_prompts, load_train_and_eval
from tests.tiny import make_tokenizer

CHAT = (
    "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}p{% endif %}"
)
ROWS = [{"question": "ab", "answer": "c"}, {"question": "de", "answer": "f"}, {"question": "g", "answer": "h"}]
TEMPLATE = DataConfig(prompt_template="{question}a")


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def chat_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def write(tmp_path, ending):
    path = tmp_path / f"rows{ending}"
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    if ending == ".jsonl":
        path.write_text(lines)
    elif ending == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif ending == ".json":
        path.write_text(json.dumps(ROWS))
    elif ending == ".csv":
        path.write_text("question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in ROWS))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return str(path)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet"])
def test_files(tmp_path, tokenizer, ending):
    data = load_prompts(write(tmp_path, ending), tokenizer, TEMPLATE)
    assert [row["prompt"] for row in data] == ["aba", "dea", "ga"]
    assert data[1]["answer"] == "f" and data[0]["prompt_ids"] == [2, 3, 2]


def test_lists_and_datasets(tokenizer):
    import datasets

    assert [row["prompt"] for row in load_prompts(["ab", "c"], tokenizer)] == ["ab", "c"]
    assert load_prompts([{"prompt": "ab", "x": 1}], tokenizer)[0]["x"] == 1
    assert load_prompts(datasets.Dataset.from_list(ROWS), tokenizer, TEMPLATE)[2]["prompt"] == "ga"


def test_conversations_go_through_the_chat_template(chat_tokenizer):
    messages = [{"role": "user", "content": "ab"}]
    row = load_prompts([{"prompt": messages}], chat_tokenizer)[0]
    assert row["prompt"] == messages and chat_tokenizer.decode(row["prompt_ids"]) == chat_tokenizer.decode(
        [0, 2, 3, 17]
    )
    text = load_prompts(["ab"], chat_tokenizer, DataConfig(system_prompt="n"))[0]
    assert len(text["prompt_ids"]) == 6, "system and user message, and the generation prompt"
    assert load_prompts(["ab"], chat_tokenizer, DataConfig(chat=False))[0]["prompt_ids"] == [2, 3]


def test_a_conversation_needs_a_chat_template(tokenizer):
    with pytest.raises(ValueError, match="no chat template"):
        load_prompts([{"prompt": [{"role": "user", "content": "a"}]}], tokenizer)
    with pytest.raises(ValueError, match="no chat template"):
        load_prompts(["a"], tokenizer, DataConfig(chat=True))


@pytest.mark.parametrize(
    ("source", "config", "error", "message"),
    [
        ([], DataConfig(), ValueError, "empty"),
        (["a", " "], DataConfig(), ValueError, "row 1 has an empty prompt"),
        (["a", 3], DataConfig(), TypeError, "row 1 is 3"),
        (7, DataConfig(), TypeError, "the data set is int"),
        ([{"prompt": 5}], DataConfig(), TypeError, "column 'prompt' is 5"),
        (ROWS, DataConfig(), ValueError, "row 0 has no column 'prompt', only 'question', 'answer'"),
        (ROWS, DataConfig(prompt_template="{qestion}"), ValueError, "nearest is 'question'"),
        (ROWS, DataConfig(prompt_template="{question.__class__}"), ValueError, "plain column names"),
        (ROWS, DataConfig(prompt_template="{question!r}"), ValueError, "plain column names"),
        (
            ["ab", "abcd"],
            DataConfig(max_prompt_tokens=3),
            ValueError,
            "row 1 has a prompt of 4 tokens, expected at most 3",
        ),
        (["abcd"], DataConfig(max_prompt_tokens=3, drop_long_prompts=True), ValueError, "all 1 prompts are longer"),
        ("./nowhere.jsonl", DataConfig(), FileNotFoundError, "nowhere.jsonl does not exist"),
    ],
)
def test_bad_input(tokenizer, source, config, error, message):
    with pytest.raises(error, match=message):
        load_prompts(source, tokenizer, config)


def test_bad_files(tmp_path, tokenizer):
    odd = tmp_path / "rows.txt"
    odd.write_text("a")
    with pytest.raises(ValueError, match="ends in '.txt'"):
        load_prompts(str(odd), tokenizer)
    broken = tmp_path / "rows.jsonl"
    broken.write_text('{"prompt": "a"}\n{"prompt": ')
    with pytest.raises(ValueError, match="rows.jsonl cannot be read"):
        load_prompts(str(broken), tokenizer)


def test_long_prompts_are_left_out_when_asked(tokenizer, capsys):
    config = DataConfig(drop_long_prompts=True)
    assert [row["prompt"] for row in load_prompts(["ab", "abcd"], tokenizer, config, 3)] == ["ab"]
    assert "left out 1 of 2 prompts" in capsys.readouterr().out


def test_held_out_rows(tmp_path, tokenizer):
    path = write(tmp_path, ".jsonl")
    train, held_out = load_train_and_eval(DataConfig(path=path, prompt_template="{question}", eval_size=1), tokenizer)
    assert [row["prompt"] for row in train] == ["ab", "de"] and [row["prompt"] for row in held_out] == ["g"]
    config = DataConfig(path=path, eval_path=path, prompt_template="{question}", eval_size=2)
    assert [len(part) for part in load_train_and_eval(config, tokenizer)] == [3, 2]
    assert load_train_and_eval(DataConfig(path=path, prompt_template="{question}"), tokenizer)[1] is None
    with pytest.raises(ValueError, match="eval_size is 3, expected less than the 3 rows"):
        load_train_and_eval(DataConfig(path=path, prompt_template="{question}", eval_size=3), tokenizer)


def test_gsm8k(gsm8k_train, tokenizer):
    config = DataConfig(prompt_template="{question}")
    data = load_prompts(str(gsm8k_train), tokenizer, config)
    assert len(data) == 7473 and "####" in data[0]["answer"]


@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 5), st.integers(0, 10))
def test_sampler_deals_every_prompt_once_an_epoch_and_resumes(size, batch, seed, cut):
    sampler = PromptSampler(size, batch, seed)
    dealt = []
    for step in range(12):
        if step == cut:
            state = json.loads(json.dumps(sampler.state_dict()))
            sampler = PromptSampler(size, batch, seed)
            sampler.load_state_dict(state)
        dealt += sampler.next()
    whole = PromptSampler(size, batch, seed)
    assert dealt == [index for _ in range(12) for index in whole.next()]
    for epoch in range(len(dealt) // size):
        assert sorted(dealt[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_sampler_refuses_another_data_set():
    with pytest.raises(ValueError, match="trained on 5 prompts, expected 6"):
        PromptSampler(6, 2, 0).load_state_dict(PromptSampler(5, 2, 0).state_dict())
