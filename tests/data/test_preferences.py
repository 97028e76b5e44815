"""Pairs become what the reward model reads; what teaches nothing is left out with its number, what is no pair is refused by its row."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from fastppo.data.preferences import load_preferences
from fastppo.reward_model_config import PreferencesConfig
from tests.tiny import make_tokenizer

DATA = Path(__file__).resolve().parents[2] / "recipes" / "data"
TEMPLATE = "{% for m in messages %}{{ {'user': 'm', 'assistant': 'n'}[m['role']] + m['content'] }}{% endfor %}p"
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


def said(*contents):
    """A conversation whose turns alternate."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def answer(text):
    return [{"role": "assistant", "content": text}]


@pytest.fixture
def load(tmp_path):
    """load(rows, ...) -> (texts of the pairs to train on, held-out pairs, notes)"""

    def act(rows, *, template=None, max_tokens=64, eval_size=1, **settings):
        path, notes = tmp_path / "pairs.jsonl", []
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizer = make_tokenizer()
        tokenizer.chat_template = template
        config = PreferencesConfig(path=str(path), eval_size=eval_size, **settings)
        limits = {"max_tokens": max_tokens, "vocab_size": len(tokenizer)}
        train, held_out = load_preferences(config, tokenizer, **limits, note=notes.append)
        texts = [tuple(tokenizer.decode(ids) for ids in (pair.chosen_ids, pair.rejected_ids)) for pair in train]
        return texts, held_out, notes

    return act


@pytest.mark.parametrize(
    ("row", "template", "expected"),
    [
        (PAIR, None, ("ab<eos>", "ac<eos>")),
        (PAIR, TEMPLATE, ("manbp", "mancp")),
        ({"chosen": "ab", "rejected": "ac"}, None, ("ab<eos>", "ac<eos>")),
        ({"prompt": said("a"), "chosen": answer("b"), "rejected": answer("c")}, TEMPLATE, ("manbp", "mancp")),
        ({"chosen": said("a", "b"), "rejected": said("a", "c")}, TEMPLATE, ("manbp", "mancp")),
    ],
    ids=["texts", "texts by a template", "whole texts", "conversations", "whole conversations"],
)
def test_every_form_of_pair(load, row, template, expected):
    train, held_out, notes = load([row, row], template=template)
    assert train == [expected] and len(held_out) == 1 and notes == []


def test_whole_texts_leave_the_template_out(load):
    train, _, notes = load([{"chosen": "ab", "rejected": "ac"}] * 2, template=TEMPLATE)
    assert train == [("ab<eos>", "ac<eos>")] and "its chat template is left out" in notes[0]


def test_what_teaches_nothing_is_left_out_with_its_number(load):
    rows = [PAIR, PAIR | {"rejected": "b"}, PAIR | {"chosen": "b" * 8}, PAIR | {"rejected": "b"}, PAIR, PAIR]
    train, held_out, notes = load(rows, max_tokens=8, eval_size=2)
    assert train == [("ab<eos>", "ac<eos>")] and len(held_out) == 2
    assert notes == [
        "left out 2 of 4 pairs to train on: chosen and rejected are the same",
        "left out 1 of 4 pairs to train on: longer than 8 tokens",
    ]


def test_pairs_that_contradict_each_other_are_said(load):
    *_, notes = load([PAIR, PAIR | {"chosen": "c", "rejected": "b"}, PAIR, PAIR])
    assert notes == ["1 of the pairs to train on stand there the other way round too: one of each two is wrong"]


def test_margins(load, tmp_path):
    _, held_out, _ = load([PAIR | {"margin": 1}, PAIR | {"margin": 0.5}])
    assert held_out[0].margin == 0.5
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected,margin\na,b,c,1.5\na,b,c,2\n")
    config = PreferencesConfig(path=str(tmp_path / "pairs.csv"), eval_size=1, columns={"margin": "float"})
    train, _ = load_preferences(config, make_tokenizer(), max_tokens=9, vocab_size=18, note=print)
    assert train[0].margin == 1.5


def test_a_file_of_held_out_pairs(load, tmp_path):
    (tmp_path / "held_out.jsonl").write_text(json.dumps(PAIR | {"chosen": "d"}) + "\n")
    train, held_out, _ = load([PAIR, PAIR], eval_path=str(tmp_path / "held_out.jsonl"))
    assert len(train) == 2 and held_out[0].chosen == "d"


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "row 1 has no 'rejected', expected .* it has prompt, chosen"),
        (PAIR | {"chosen": None}, "row 1 has no 'chosen'"),
        (PAIR | {"chosen": 3}, "'chosen' of row 1 is int"),
        ({"chosen": "b", "rejected": "c"}, "row 1 has a text as chosen .* nothing as prompt, expected .*first row"),
        (PAIR | {"prompt": said("a")}, "row 1 has a conversation as prompt, a text as chosen"),
        (PAIR | {"chosen": answer("b")}, "row 1 has a text as prompt, a conversation as chosen"),
        ({"chosen": [{"role": "user"}], "rejected": said("a")}, "'chosen' of row 1 has the message"),
        (PAIR | {"margin": 1}, "row 1 has a margin, expected one in every row or in none"),
        (PAIR | {"chosen": "z" * 99}, None),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_a_row_that_is_no_pair_is_named(load, odd, message):
    if message is None:  # an unknown letter is no error of the data
        assert load([PAIR, odd, PAIR, PAIR])[2] == ["left out 1 of 3 pairs to train on: longer than 64 tokens"]
        return
    with pytest.raises(ValueError, match=message):
        load([PAIR, odd, PAIR, PAIR])


@pytest.mark.parametrize(
    ("margin", "message"),
    [("1", "is the text '1', expected a number: data.columns"), (-1, "is -1, expected"), (True, "is True, expected")],
)
def test_wrong_margins(load, margin, message):
    with pytest.raises(ValueError, match=f"the margin of row 1 {message}"):
        load([PAIR | {"margin": 1}, PAIR | {"margin": margin}, PAIR | {"margin": 1}])


def test_files_without_a_pair_to_learn_from(load):
    with pytest.raises(ValueError, match="none of the 2 pairs to train on is left: in 2 of them chosen and rejected"):
        load([PAIR | {"chosen": "c"}] * 2 + [PAIR])
    with pytest.raises(ValueError, match="eval_size is 3, expected less than 3"):
        load([PAIR] * 3, eval_size=3)
    with pytest.raises(ValueError, match="holds no row, expected at least one"):
        load([])
    with pytest.raises(ValueError, match="row 0: a conversation needs a chat template"):
        load([{"chosen": said("a", "b"), "rejected": said("a", "c")}] * 2)


def test_a_token_without_an_embedding_is_named(tmp_path):
    (tmp_path / "pairs.jsonl").write_text((json.dumps(PAIR) + "\n") * 2)
    config = PreferencesConfig(path=str(tmp_path / "pairs.jsonl"), eval_size=1)
    with pytest.raises(ValueError, match="row 0 has .* an id that is not below 3"):
        load_preferences(config, make_tokenizer(), max_tokens=9, vocab_size=3, note=print)


def test_our_pairs_are_what_their_script_makes():
    spec = importlib.util.spec_from_file_location("preferences_of_the_recipe", DATA / "preferences.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    lines = (DATA / "preferences.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == script.pairs() and len(lines) == 300
