"""Examples: which tokens are imitated, where a completion ends, and what is refused."""

from __future__ import annotations

import pytest

from fastppo.data import load_prompts
from fastppo.data.examples import load_examples, load_train_and_eval_examples
from fastppo.recipe_config import DataConfig
from fastppo.sft_config import ExamplesConfig
from tests.data.conftest import user

TURNS = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and m.reasoning and loop.last %}({{ m.reasoning }}){% endif %}{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def turns_tokenizer(tokenizer):
    """Each turn ends with a token of its own; of reasoning the template keeps the last turn's alone."""
    tokenizer.add_tokens(["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"], special_tokens=True)
    tokenizer.chat_template = TURNS
    return tokenizer


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def shown(tokenizer, example):
    """The tokens as text, in braces those that are imitated."""
    text, targets = "", set(example.targets)
    for place, token in enumerate(tokenizer.convert_ids_to_tokens(list(example.tokens))):
        text += f"{{{token}}}" if place in targets else token
    return text.replace("}{", "")


def examples(tokenizer, rows, **settings):
    return [shown(tokenizer, example) for example in load_examples(rows, tokenizer, ExamplesConfig(**settings))]


ROW = {"prompt": "1+1=", "completion": "2"}


def test_texts_end_with_the_end_of_sequence_once(tokenizer):
    assert examples(tokenizer, [ROW, ROW | {"completion": "2</s>"}]) == ["<s>1+1={2</s>}"] * 2


def test_columns_by_template(tokenizer):
    row = {"question": "1+1", "answer": 2, "level": 7}
    settings = {"prompt_template": "{question}=", "completion_template": "<{answer}>"}
    assert examples(tokenizer, [row], **settings) == ["<s>1+1={<2></s>}"]


def test_texts_that_are_rendered_already_get_no_token_but_the_end(tokenizer):
    row = {"prompt": "</s>1+1=", "completion": "2"}
    assert examples(tokenizer, [row], rendered=True) == ["</s>1+1={2</s>}"]


def test_a_rendered_turn_that_is_ended_is_not_ended_again(turns_tokenizer):
    row = {"prompt": "<|user|>1+1=<|end|>\n<|assistant|>", "completion": "2<|end|>"}
    assert examples(turns_tokenizer, [row], rendered=True) == ["<|user|>1+1=<|end|>\n<|assistant|>{2<|end|>}"]


def test_a_prompt_has_the_tokens_that_ppo_gives_it(tokenizer, turns_tokenizer):
    for settings in ({"chat": False}, {"system_prompt": "add"}):
        example = load_examples([ROW], tokenizer, ExamplesConfig(**settings))[0]
        prompt = load_prompts([ROW], tokenizer, DataConfig(**settings))[0]["prompt_ids"]
        assert list(example.tokens[: example.targets[0]]) == prompt


def test_a_token_across_the_border_is_not_made(tokenizer):
    """A prompt's tokens are those that stand before the first sampled one."""
    tokenizer.add_tokens(["=2"])
    assert examples(tokenizer, [ROW]) == ["<s>1+1={2</s>}"]


def test_texts_become_turns(turns_tokenizer):
    expected = "<|system|>add<|end|>\n<|user|>1+1=<|end|>\n<|assistant|>{2<|end|>}"
    assert examples(turns_tokenizer, [ROW], system_prompt="add") == [expected]


def test_conversations_as_prompt_and_completion(turns_tokenizer):
    """What the assistant said in the prompt is not imitated, what it says in the completion is, in all its turns."""
    prompt = [*user("a"), assistant("b"), *user("c")]
    rows = [{"prompt": prompt, "completion": [assistant("d"), *user("e"), assistant("f")]}]
    before = "<|user|>a<|end|>\n<|assistant|>b<|end|>\n<|user|>c<|end|>\n<|assistant|>"
    assert examples(turns_tokenizer, rows) == [f"{before}{{d<|end|>}}\n<|user|>e<|end|>\n<|assistant|>{{f<|end|>}}"]
    assert examples(turns_tokenizer, [{"prompt": prompt, "completion": "d"}]) == [before + "{d<|end|>}"]


def test_of_messages_the_assistants_turns_are_imitated(turns_tokenizer):
    """With the token that ends each, and nothing of the template around them."""
    conversation = [{"role": "system", "content": "s"}, *user("a"), assistant("b"), *user("c"), assistant("d")]
    expected = (
        "<|system|>s<|end|>\n<|user|>a<|end|>\n<|assistant|>{b<|end|>}\n<|user|>c<|end|>\n<|assistant|>{d<|end|>}"
    )
    assert examples(turns_tokenizer, [{"messages": conversation}]) == [expected]


def test_a_template_that_rewrites_the_past_gives_an_example_a_turn(turns_tokenizer):
    """Each as it is sampled: with its own reasoning, after a past without."""
    conversation = [*user("a"), assistant("b", reasoning="x"), *user("c"), assistant("d", reasoning="y")]
    rows = [{"messages": conversation}, {"messages": conversation[:2]}]
    found = load_examples(rows, turns_tokenizer)
    first = "<|user|>a<|end|>\n<|assistant|>{(x)b<|end|>}"
    second = "<|user|>a<|end|>\n<|assistant|>b<|end|>\n<|user|>c<|end|>\n<|assistant|>{(y)d<|end|>}"
    assert [shown(turns_tokenizer, example) for example in found] == [first, second, first]
    assert [example.row for example in found] == [0, 0, 1]


def test_without_a_token_that_ends_turns_each_ends_with_the_end_of_sequence(chat_tokenizer):
    conversation = [*user("a"), assistant("b"), *user("c"), assistant("d")]
    expected = ["<s>[user]a[assistant]{b</s>}", "<s>[user]a[assistant]b[user]c[assistant]{d</s>}"]
    assert examples(chat_tokenizer, [{"messages": conversation}]) == expected


def test_messages_are_passed_over_where_there_is_a_completion(turns_tokenizer):
    rows = [ROW | {"messages": [*user("a"), assistant("b")]}]
    assert examples(turns_tokenizer, rows) == ["<|user|>1+1=<|end|>\n<|assistant|>{2<|end|>}"]


def test_a_files_last_rows_are_held_out(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "{n}", "completion": "{n}"}}\n' for n in range(5)))
    train, held_out = load_train_and_eval_examples(ExamplesConfig(path=path, eval_size=2), tokenizer)
    assert [example.row for example in train] == [0, 1, 2] and [example.row for example in held_out] == [3, 4]
    assert load_train_and_eval_examples(ExamplesConfig(path=path), tokenizer)[1] is None


def test_long_rows_are_left_out_or_refused_but_never_cut(tokenizer, caplog):
    rows = [ROW, ROW | {"completion": "22222"}]
    with pytest.raises(ValueError, match=r"row 1 has 11 tokens with its completion, expected at most 7 \(1 of 2"):
        examples(tokenizer, rows, max_tokens=7)
    assert examples(tokenizer, rows, max_tokens=7, drop_long_rows=True) == ["<s>1+1={2</s>}"]
    assert "left out 1 of 2 examples: longer than 7 tokens" in caplog.text
    with pytest.raises(ValueError, match="all 2 examples are longer than 3 tokens"):
        examples(tokenizer, rows, max_tokens=3, drop_long_rows=True)
    with pytest.raises(ValueError, match="row 0 has 7 tokens with its completion, expected at most 5"):
        load_examples(rows, tokenizer).limited(5, 200)


BAD_TEXTS = {
    "no completion": ([{"prompt": "a"}], r"completion_template is '\{completion\}', which names the column 'completion'"),
    "none in a row": ([ROW, {"prompt": "a"}], "column 'completion' of row 1 is NoneType, expected a text or a number"),
    "an empty one": ([ROW, {"prompt": "a", "completion": ""}], "the completion of row 1 is empty: ''"),
    "an empty prompt": ([{"prompt": " ", "completion": "b"}], "the prompt of row 0 is empty: ' '"),
    "no rows": ([], "the data set is empty"),
    "end in the prompt": ([{"prompt": "a</s>", "completion": "b"}], "the prompt of row 0 has the end of sequence '</s>' in it"),
    "end before the end": ([{"prompt": "a", "completion": "b</s>c"}], "the completion of row 0 has the end of sequence '</s>' before"),
    "two ends": ([{"prompt": "a", "completion": "b</s></s>"}], "the completion of row 0 has the end of sequence '</s>' before"),
    "messages without a template": ([{"messages": user("a")}], "cannot be read because the tokenizer has no chat template"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_TEXTS)
def test_texts_that_cannot_be_learned_from(tokenizer, what):
    rows, message = BAD_TEXTS[what]
    with pytest.raises(ValueError, match=message):
        load_examples(rows, tokenizer)


BAD_CONVERSATIONS = {
    "ends with 'user'": (user("a"), "'messages' of row 0 ends with a message of the role 'user', expected the assistant's"),
    "begins with the assistant": ([assistant("a")], "the conversation of row 0 begins with the assistant's turn"),
    "no messages": ([], "the messages of row 0 is a conversation without messages"),
    "none": (None, "'messages' of row 0 is NoneType, expected a list of messages"),
    "a text": ("hello", "'messages' of row 0 is str, expected a list of messages"),
    "an empty turn": ([*user("a"), assistant(" ")], "message 1 of the conversation of row 0 is empty"),
    "no role": ([*user("a"), {"content": "b"}], "the messages of row 0 has the message {'content': 'b'}, expected a dict"),
    "an end within": ([*user("a"), assistant("b<|end|>c")], "message 1 of the conversation of row 0 ends with .*, expected the chat template's own"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_CONVERSATIONS)
def test_conversations_that_cannot_be_learned_from(turns_tokenizer, what):
    messages, message = BAD_CONVERSATIONS[what]
    with pytest.raises(ValueError, match=message):
        load_examples([{"messages": messages}], turns_tokenizer)


def test_a_template_that_begins_a_turn_otherwise_than_it_writes_one(turns_tokenizer):
    turns_tokenizer.chat_template = TURNS.replace("<|assistant|>{% endif %}", "<|assistant|>think{% endif %}")
    with pytest.raises(ValueError, match="the chat template writes message 1 of the conversation of row 0 otherwise"):
        load_examples([{"messages": [*user("a"), assistant("b")]}], turns_tokenizer)


def test_a_tokenizer_without_an_end_of_sequence(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no end of sequence, expected one"):
        load_examples([ROW], tokenizer)


def test_a_token_that_the_model_does_not_know(tokenizer):
    with pytest.raises(ValueError, match=r"row 0 has the token .=. with id \d+, expected ids below 10"):
        load_examples([ROW], tokenizer).limited(None, 10)
