"""The tokenizer's chat template: conversations, texts that it was applied to already, and what else it gets from a row."""

from __future__ import annotations

import datetime
import json
import re

import numpy as np
import pytest
from tokenizers import processors

from fastppo.data import load_prompts
from fastppo.recipe_config import DataConfig
from tests.data.conftest import spelled, user


def test_texts_go_through_the_chat_template_where_there_is_one(chat_tokenizer):
    row = load_prompts(["hi"], chat_tokenizer, DataConfig(system_prompt="Be brief."))[0]
    assert "".join(spelled(chat_tokenizer, row)) == "<s>[system]Be brief.[user]hi[assistant]"
    assert row["prompt_ids"].count(chat_tokenizer.bos_token_id) == 1
    assert row["prompt"] == "hi"


def test_chat_off(chat_tokenizer):
    row = load_prompts(["hi"], chat_tokenizer, DataConfig(chat=False))[0]
    assert spelled(chat_tokenizer, row) == ["<s>", *"hi"]


@pytest.mark.parametrize("template", ["{prompt}", "{talk}"])
def test_conversations(chat_tokenizer, template):
    talk = [
        {"role": "user", "content": "hi", "name": None},  # what a table fills in
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "bye"},
    ]
    row = load_prompts([{template[1:-1]: talk, "answer": "x"}], chat_tokenizer, DataConfig(prompt_template=template))[0]
    assert "".join(spelled(chat_tokenizer, row)) == "<s>[user]hi[assistant]yes?[user]bye[assistant]"
    assert row["prompt"] == [{"role": "user", "content": "hi"}, *talk[1:]] and row["answer"] == "x"


def test_system_prompt_comes_first(chat_tokenizer):
    row = load_prompts([[{"role": "user", "content": "hi"}]], chat_tokenizer, DataConfig(system_prompt="Be brief."))[0]
    assert "".join(spelled(chat_tokenizer, row)) == "<s>[system]Be brief.[user]hi[assistant]"
    assert row["prompt"] == user("hi")


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
        load_prompts(source, chat_tokenizer, DataConfig(**config))


def test_a_tokenizer_without_a_chat_template(tokenizer):
    with pytest.raises(
        ValueError, match="row 0 is a conversation, expected a text because the tokenizer has no chat template"
    ):
        load_prompts([user("hi")], tokenizer)
    with pytest.raises(ValueError, match="chat is true, but the tokenizer has no chat template"):
        load_prompts(["hi"], tokenizer, DataConfig(chat=True))
    with pytest.raises(ValueError, match="system_prompt is set"):
        load_prompts(["hi"], tokenizer, DataConfig(system_prompt="x"))


# Texts that the chat template was applied to already

RENDERED = [
    "<s>[user]hi[assistant]",
    "<s>[system]x[user]hi[assistant]",
    "[user]hi[assistant]",
    "[user]hi[assistant]\n",
    "  <s>[user]hi[assistant]",
    "what does <s> mean?",
]


@pytest.mark.parametrize("text", RENDERED)
def test_a_rendered_text_is_refused_or_taken_as_one_setting_says(chat_tokenizer, text):
    source = ["hi", text]
    with pytest.raises(ValueError, match=r"row 1 has '(<s>|\[assistant\])', as if .*set rendered to true .* to false"):
        load_prompts(source, chat_tokenizer)
    as_it_is = load_prompts(source, chat_tokenizer, DataConfig(rendered=True))
    assert [row["prompt"] for row in as_it_is] == source
    assert spelled(chat_tokenizer, as_it_is[0]) == [*"hi"] and "".join(spelled(chat_tokenizer, as_it_is[1])) == text
    once_more = load_prompts(source, chat_tokenizer, DataConfig(rendered=False))
    assert "".join(spelled(chat_tokenizer, once_more[1])) == f"<s>[user]{text}[assistant]"


@pytest.mark.parametrize(
    ("template", "text", "mark"),
    [
        (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>",
            None,
            "<|end|><|assistant|>",
        ),
        ("{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}", None, "[/INST]"),
        (
            "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}",
            "[INST] as others wrote it [/INST]\n",
            "[/INST]",
        ),
        ("{% for m in messages %}USER: {{ m.content }} {% endfor %}ASSISTANT:", None, "ASSISTANT:"),
        ("{% for m in messages %}{{ bos_token }}{{ m.content }}\n{% endfor %}", None, "<s>"),
    ],
)
def test_templates_without_special_tokens_are_known_by_their_end(tokenizer, template, text, mark):
    tokenizer.chat_template = template
    rendered = text or tokenizer.apply_chat_template(user("hi"), add_generation_prompt=True, tokenize=False)
    load_prompts(["hi"], tokenizer)
    with pytest.raises(ValueError, match=f"row 1 has {re.escape(repr(mark))}"):
        load_prompts(["hi", rendered], tokenizer)


@pytest.mark.parametrize("text", ["a </s> b", "a <tool> b", "[user] in the middle", "[assistant] at the beginning"])
def test_a_text_without_the_templates_own_tokens_is_a_text(chat_tokenizer, text):
    chat_tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    row = load_prompts([text], chat_tokenizer)[0]
    assert "".join(spelled(chat_tokenizer, row)) == f"<s>[user]{text}[assistant]"


def test_a_template_that_refuses_the_probe_leaves_every_special_token(chat_tokenizer):
    chat_tokenizer.chat_template = (
        "{{ raise_exception('one message only') if messages | length > 1 }}[{{ messages[0].content }}]"
    )
    assert load_prompts(["hi"], chat_tokenizer)[0]["prompt"] == "hi"
    with pytest.raises(ValueError, match="row 0 has '</s>'"):
        load_prompts(["a </s> b"], chat_tokenizer)


@pytest.mark.parametrize("chat", [None, False])
@pytest.mark.parametrize("text", ["<s>hi", "<s>[user]hi[assistant]"])
def test_a_second_beginning_of_sequence_is_never_added_silently(tokenizer, text, chat):
    if chat is False:
        tokenizer.chat_template = "[{{ messages[0].content }}]"
    with pytest.raises(ValueError, match="row 0 has '<s>', as if .*the tokenizer adds another: set rendered to true"):
        load_prompts([text], tokenizer, DataConfig(chat=chat))
    taken = load_prompts([text], tokenizer, DataConfig(chat=chat, rendered=True))[0]
    assert "".join(spelled(tokenizer, taken)) == text
    again = load_prompts([text], tokenizer, DataConfig(chat=chat, rendered=False))[0]
    assert "".join(spelled(tokenizer, again)) == "<s>" + text
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    assert "".join(spelled(tokenizer, load_prompts([text], tokenizer, DataConfig(chat=False))[0])) == text, "none added"


def test_settings_that_rendered_excludes(chat_tokenizer):
    with pytest.raises(ValueError, match="chat and rendered are both true"):
        load_prompts(["hi"], chat_tokenizer, DataConfig(chat=True, rendered=True))
    with pytest.raises(ValueError, match="system_prompt is set, but no chat template"):
        load_prompts(["hi"], chat_tokenizer, DataConfig(system_prompt="x", rendered=True))
    with pytest.raises(ValueError, match="row 0 is a conversation, expected a text because rendered is true"):
        load_prompts([user("hi")], chat_tokenizer, DataConfig(rendered=True))


def test_punctuation_after_a_message_tells_nothing(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}'{{ m.content }}'. {% endfor %}"
    assert len(load_prompts(["say 'hi'.", "hi."], tokenizer)) == 2


# What else a template gets

TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
    }
]
TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}({{ tool.function.name }}){% endfor %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<{{ call.function.name }}>{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{{ '' if enable_thinking is not defined or enable_thinking else '(no)' }}{% endif %}"
)


@pytest.fixture
def tool_tokenizer(tokenizer):
    tokenizer.chat_template = TOOL_TEMPLATE
    return tokenizer


@pytest.mark.parametrize("prompt", ["hi", user("hi")], ids=["text", "conversation"])
@pytest.mark.parametrize("form", [lambda value: value, json.dumps], ids=["value", "JSON text"])
def test_tools_and_options_of_a_row_reach_the_template(tool_tokenizer, prompt, form):
    rows = [
        {"prompt": prompt, "tools": form(TOOLS), "chat_template_kwargs": form({"enable_thinking": False})},
        {"prompt": prompt, "tools": None, "chat_template_kwargs": " "},
        {"prompt": prompt, "tools": form([]), "chat_template_kwargs": form({"enable_thinking": True})},
    ]
    dataset = load_prompts(rows, tool_tokenizer)
    expected = ["(add)[user]hi[assistant](no)", "[user]hi[assistant]", "[user]hi[assistant]"]
    assert ["".join(spelled(tool_tokenizer, row)) for row in dataset] == expected
    assert [row["tools"] for row in dataset] == [row["tools"] for row in rows], "rewards get them too"


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("tools", {"a": 1}, "tools of row 0 is dict, expected a list, or JSON of one"),
        ("tools", "hammer", "tools of row 0 is 'hammer', which is not JSON: .*goes to the chat template"),
        ("tools", [7], "chat template refuses the prompt of row 0"),
        ("chat_template_kwargs", [1], "chat_template_kwargs of row 0 is list, expected a dict, or JSON of one"),
        ("chat_template_kwargs", {"tokenize": True}, "chat template refuses the prompt of row 0: .*tokenize"),
        ("chat_template_kwargs", {"add_generation_prompt": False}, "chat template refuses .*add_generation_prompt"),
    ],
)
def test_wrong_tools_and_options(tool_tokenizer, column, value, words):
    with pytest.raises(ValueError, match=words):
        load_prompts([{"prompt": "hi", column: value}], tool_tokenizer)


def test_tools_that_reach_no_prompt_are_mentioned(chat_tokenizer, caplog):
    rows = [{"prompt": "hi", "tools": TOOLS, "chat_template_kwargs": {}}]
    load_prompts(rows * 2, chat_tokenizer)
    assert [record.getMessage() for record in caplog.records] == [
        "the column 'tools' reaches no prompt: the tokenizer's chat template has no place for them"
    ]
    caplog.clear()
    load_prompts(rows * 2, chat_tokenizer, DataConfig(chat=False))
    assert [record.getMessage() for record in caplog.records] == ["the column 'tools' reaches no prompt: chat is off"]
    caplog.clear()
    load_prompts(rows, chat_tokenizer, DataConfig(rendered=True))
    named = [{"prompt": "hi", "tools": "hammer, saw"}]
    load_prompts(named, chat_tokenizer, DataConfig(prompt_template="{prompt} with {tools}"))
    assert not caplog.records


def test_a_turn_that_calls_tools_needs_no_text(tool_tokenizer):
    calls = [{"type": "function", "function": {"name": "add", "arguments": {}}}]
    talk = [*user("hi"), {"role": "assistant", "content": None, "tool_calls": calls}, {"role": "tool", "content": "7"}]
    row = load_prompts([talk], tool_tokenizer)[0]
    assert "".join(spelled(tool_tokenizer, row)) == "[user]hi[assistant]<add>[tool]7[assistant]"


# Messages as plain JSON


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.int64(3), 3),
        (np.uint8(3), 3),
        (np.float64(0.5), 0.5),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.str_("x"), "x"),
        ((1, "a"), [1, "a"]),
        ({"a": (np.int32(1), None)}, {"a": [1, None]}),
        (True, True),
    ],
    ids=repr,
)
def test_message_fields_become_plain_values_where_that_is_exact(chat_tokenizer, value, plain):
    message = load_prompts([[{"role": "user", "content": "hi", "extra": value}]], chat_tokenizer)[0]["prompt"][0]
    assert repr(message["extra"]) == repr(plain) and json.loads(json.dumps(message)) == message


ODD = [
    datetime.date(2024, 1, 2),
    datetime.datetime(2024, 1, 2),
    np.datetime64("2024-01-02"),
    {1, 2},
    b"x",
    float("nan"),
    float("inf"),
]
ODD += [np.float32("nan"), np.arange(2), {1: "a"}, {"a": [{1}]}, 1j, object(), [float("nan")]]


@pytest.mark.parametrize("value", ODD, ids=lambda value: type(value).__name__)
def test_message_fields_that_json_cannot_hold_are_refused(chat_tokenizer, value):
    """They ended the run when its first samples were written, after the first rollout."""
    talks = [user("hi"), [*user("a"), {"role": "user", "content": "b", "extra": value}]]
    with pytest.raises(
        ValueError, match="message 1 of the conversation of row 1, extra.* is .*, expected what JSON holds"
    ):
        load_prompts(talks, chat_tokenizer)
