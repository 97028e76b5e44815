"""What follows upon a turn is what the chat template would write there, and no earlier token is made again."""

from __future__ import annotations

import asyncio
import random

import pytest

from fastppo.envs import Dialogue, Tools, calculator
from tests.envs.chat import PLAIN, chat_of, make_chat_tokenizer, trl_template

QUESTION = {"role": "user", "content": "What is 2 + 2?"}
TEMPLATES = {"plain": None, "qwen2_5": "<|im_end|>", "llama3_1": "<|eot_id|>", "phi3": "<|end|>"}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>'
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "description": "."}, "b": {"type": "integer", "description": "."}},
            "required": ["a", "b"],
        },
    },
}


def tokenizer_of(name):
    end = "<|endoftext|>" if name == "phi3" else TEMPLATES[name]  # Phi-3 ends its turns otherwise than its texts
    return make_chat_tokenizer() if name == "plain" else make_chat_tokenizer(trl_template(name), end)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def rendered(tokenizer, messages, **options):
    return ids(
        tokenizer, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    )


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "cut off"])
def test_a_users_answer_follows_as_the_template_has_it(name, closed):
    tokenizer = tokenizer_of(name)
    dialogue, row = Dialogue(tokenizer, chat_of(tokenizer)), {"prompt": "What is 2 + 2?"}
    dialogue.check("user")
    prompt = dialogue.prompt(row, [QUESTION])
    said = ids(tokenizer, "Four, I think.") + (ids(tokenizer, TEMPLATES[name] or "<|im_end|>") if closed else [])
    whole = rendered(
        tokenizer, [QUESTION, {"role": "assistant", "content": "Four, I think."}, {"role": "user", "content": "Sure?"}]
    )
    assert prompt + said + dialogue.reply(row, said[-1], "Sure?") == whole


@pytest.mark.parametrize("count", [1, 2])
def test_tools_answer_as_the_template_has_it(count):
    tokenizer = tokenizer_of("qwen2_5")
    dialogue, row = Dialogue(tokenizer, chat_of(tokenizer)), {"prompt": QUESTION["content"]}
    dialogue.check_tools()
    prompt = dialogue.prompt(row, None, [ADD])
    said = ids(tokenizer, "\n".join([CALL] * count)) + [tokenizer.eos_token_id]
    message = dialogue.message(prompt, said, [ADD])
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "add", "arguments": {"a": 2, "b": 2}}
    ] * count
    answers = [{"role": "tool", "name": "add", "content": str(4 + i)} for i in range(count)]
    calls = {"role": "assistant", "content": "", "tool_calls": message["tool_calls"]}
    whole = rendered(tokenizer, [QUESTION, calls, *answers], tools=[ADD])
    assert prompt + said + dialogue.reply(row, said[-1], answers) == whole


def test_a_call_that_does_not_parse_says_so():
    tokenizer = tokenizer_of("qwen2_5")
    dialogue = Dialogue(tokenizer, chat_of(tokenizer))
    message = dialogue.message([], ids(tokenizer, '<tool_call>\n{"name": "add", \n</tool_call>') + [1], [ADD])
    assert "JSON" in message["parse_error"] and "tool_calls" not in message
    assert "parse_error" not in dialogue.message([], ids(tokenizer, "Four.") + [1], [ADD])


def test_whatever_a_model_writes_is_read_and_answered():
    tokenizer, chance = tokenizer_of("qwen2_5"), random.Random(0)
    dialogue, tools = Dialogue(tokenizer, chat_of(tokenizer)), Tools(calculator)()
    pieces = [
        "<tool_call>",
        "</tool_call>",
        "\n",
        '{"name": "calculator", "arguments": {"expression": "1+1"}}',
        "{",
        "}",
        "[",
        "null",
    ]
    pieces += [
        "<think>",
        "</think>",
        "<|im_end|>",
        '"',
        ":",
        "1e999",
        '{"name": 5}',
        "[1]",
        "<|im_start|>assistant\n",
        "a",
    ]
    pieces.append('<tool_call>\n{"name": "calculator", "arguments": {"expression": "1+1"}}\n</tool_call>')
    row, kinds = {"prompt": "?"}, set()
    for _ in range(300):
        said = ids(tokenizer, "".join(chance.choices(pieces, k=chance.randrange(1, 8))))
        message = dialogue.message(dialogue.prompt(row, None, [ADD]), said, tools.tools)
        observation, _, terminated, _, _ = asyncio.run(tools.step(message))
        kinds.add("answer" if terminated else observation[0]["content"][:5])
        assert terminated or dialogue.reply(row, said[-1], observation)
    assert kinds >= {"answer", "2", "Error"}


@pytest.mark.parametrize("role", ["user", "tool"])
def test_a_template_that_rewrites_history_is_refused_with_its_name(role):
    tokenizer = make_chat_tokenizer(trl_template("qwen3"))
    message = f"chat template of somebody/a-model rewrites an earlier turn when messages follow .roles: {role}."
    with pytest.raises(ValueError, match=message):
        Dialogue(tokenizer, chat_of(tokenizer)).check(role)


def test_its_training_form_is_taken():
    tokenizer = make_chat_tokenizer(trl_template("qwen3_training"))
    tokenizer.response_template = {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {"content": {"content": "text"}},
    }
    Dialogue(tokenizer, chat_of(tokenizer)).check_tools()


def test_a_template_without_tools_is_refused():
    bare = PLAIN[PLAIN.index("{% for m") :]
    tokenizer = make_chat_tokenizer(bare)
    with pytest.raises(ValueError, match="chat template of somebody/a-model has no place for tools"):
        Dialogue(tokenizer, chat_of(tokenizer)).check_tools()
    with pytest.raises(ValueError, match="tools need prompts that a chat template renders"):
        Dialogue(tokenizer, None).check_tools()


def test_a_template_whose_calls_nobody_can_read_is_refused():
    pytest.importorskip("trl")
    tokenizer = make_chat_tokenizer()
    with pytest.raises(ValueError, match="somebody/a-model has no response_template, and trl knows none for it"):
        Dialogue(tokenizer, chat_of(tokenizer)).check_tools()


def test_without_a_chat_template_texts_follow_as_they_are():
    tokenizer = make_chat_tokenizer()
    dialogue = Dialogue(tokenizer, None)
    row = {"prompt": "ab", "prompt_ids": ids(tokenizer, "ab")}
    assert dialogue.prompt(row, None) is row["prompt_ids"]
    assert dialogue.prompt(row, "cd") == ids(tokenizer, "cd")
    assert dialogue.reply(row, 1, "ef") == ids(tokenizer, "ef") and dialogue.reply(row, 1, None) == []
