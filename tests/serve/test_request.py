"""What may stand in a request, what it comes to, and how the rest is refused."""

from __future__ import annotations

import pytest

from fastppo.serve import RequestError
from fastppo.serve.request import assistant_message, read_messages, read_request

LEAST = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"where": "up"}'}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def test_the_least_that_can_be_asked():
    request = read_request(LEAST)
    assert (request.n, request.max_tokens, request.seed, request.stop, request.tools) == (1, None, None, (), [])
    assert not request.stream and not request.logprobs and request.temperature is None


def test_what_is_asked_for():
    asked = {
        "n": 3,
        "max_completion_tokens": 7,
        "temperature": 0,
        "top_p": 0.5,
        "seed": -1,
        "stop": "x",
        "stream": True,
    }
    request = read_request(LEAST | asked | {"stream_options": {"include_usage": True}, "user": "me", "top_logprobs": 0})
    assert (request.n, request.max_tokens, request.temperature, request.top_p) == (3, 7, 0.0, 0.5)
    assert (request.seed, request.stop, request.stream, request.include_usage) == (-1, ("x",), True, True)
    assert read_request(LEAST | {"tools": [TOOL]}).tools == [TOOL]
    assert read_request(LEAST | {"tools": [TOOL], "tool_choice": "none"}).tools == []


def test_null_is_what_was_not_asked():
    assert read_request(LEAST | dict.fromkeys(("n", "stop", "tools", "seed", "logit_bias"))) == read_request(LEAST)


def test_an_answer_that_comes_back_is_what_was_answered():
    """As `openai` sends it: with the empty fields of its own objects, and arguments as JSON."""
    sent = {
        "role": "assistant",
        "content": None,
        "tool_calls": [CALL],
        "refusal": None,
        "annotations": [],
        "audio": None,
    }
    asked = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}, sent]
    found = read_messages([*asked, {"role": "tool", "tool_call_id": "call_1", "content": "blue"}])
    answer = assistant_message("", [{"name": "look", "arguments": {"where": "up"}}])
    assert found == [{"role": "user", "content": "hi"}, answer, {"role": "tool", "name": "look", "content": "blue"}]


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"top_logprobs": 2}, "top_logprobs", "top_logprobs is 2, expected 0"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "expected {}"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "frequency_penalty is 0.5, expected 0"),
        ({"response_format": {"type": "json_object"}}, "response_format", "expected {\"type\": \"text\"}"),
        ({"tool_choice": "required"}, "tool_choice", 'expected "auto" or "none"'),
        ({"best_of": 2}, "best_of", "best_of is not known here"),
        ({"n": 0}, "n", "n is 0, expected an integer from 1 to 128"),
        ({"n": True}, "n", "n is True, expected an integer"),
        ({"temperature": 3}, "temperature", "temperature is 3, expected a number from 0 to 2"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "max_tokens", "stands beside max_completion_tokens"),
        ({"stop": ["a", ""]}, "stop", "expected at most 4 texts that are not empty"),
        ({"stream": "yes"}, "stream", "stream is 'yes', expected true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "without stream"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "expected a function with a name"),
        ({"model": None}, "model", "model is missing"),
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "int 3, expected a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "parts that are"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]", "expected an object with a role: system"),
        ({"messages": [{"role": "user", "content": "x", "prefix": True}]}, "messages[0].prefix", "not known"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "ends with the assistant's turn"),
        ({"messages": [{"role": "user", "content": "a\ud83d"}]}, None, r"the body holds '\ud83d', half a character"),
        ({"\ud83d": 1}, None, r"the body holds '\ud83d', half a character"),
        ({"messages": [{"role": "tool", "tool_call_id": {}}]}, "messages[0].tool_call_id", "dict {}, expected a text"),
        ({"messages": [{"role": "tool", "name": 3}]}, "messages[0].name", "int 3, expected a text"),
        ({"messages": [{"role": "assistant", "tool_calls": [CALL | {"id": [1]}]}]}, "messages[0].tool_calls[0].id", "list [1]"),
    ],
)  # fmt: skip
def test_what_is_refused(changes, param, message):
    with pytest.raises(RequestError) as refused:
        read_request(LEAST | changes)
    assert refused.value.param == param and message in str(refused.value) and refused.value.status == 400
    assert refused.value.body()["error"]["type"] == "invalid_request_error"


def test_a_body_that_is_no_object():
    with pytest.raises(RequestError, match=r"the body is list \[\], expected a JSON object"):
        read_request([])
