"""What a client asks for: the body of a request for chat completions, read and checked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
MOST_CHOICES = 128
MOST_STOPS = 4
WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
"""Parameters that say nothing about what is sampled."""
ONLY = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True,),
    "modalities": (["text"],),
}
"""Parameters of which only these values are known here; null stands for the first one."""
PARTS_OF_MESSAGES = {"role", "content", "name", "tool_calls", "tool_call_id"}
LEFT_OUT_OF_MESSAGES = {"refusal", "annotations", "audio", "function_call", "reasoning_content"}
"""What clients send back of an answer of ours, and no chat template reads."""


class RequestError(Exception):
    """A request that is refused, as OpenAI's error objects say it.

    Args:
        param: which parameter is wrong. code: a word for programs. status: of HTTP.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class ChatRequest:
    """A request; None where it leaves a setting to the server."""

    model: str
    messages: list[Message]
    """`role`, `content` (a text), and where there are some `tool_calls` as chat templates read them and the `name` of the tool that answers."""
    tools: list[dict[str, Any]]
    n: int
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    seed: int | None
    stop: tuple[str, ...]
    logprobs: bool
    stream: bool
    include_usage: bool
    """A stream ends with the numbers of tokens."""


def read_request(body: Any) -> ChatRequest:
    """Raises RequestError for what is wrong or not known here."""
    if not isinstance(body, Mapping):
        raise RequestError(f"the body is {_kind(body)}, expected a JSON object")
    _require_whole_characters(body)
    fields = {name: value for name, value in body.items() if value is not None}
    known = _READERS.keys() | ONLY.keys() | WITHOUT_EFFECT | {"model", "messages", "tools", "stream_options"}
    for name in fields:
        if name not in known:
            raise RequestError(f"{name} is not known here", name, "unknown_parameter")
    for name, values in ONLY.items():
        if fields.get(name, values[0]) not in values:
            shown = " or ".join(json.dumps(value) for value in values)
            raise RequestError(f"{name} is {fields[name]!r}, expected {shown}", name, "unsupported_value")
    settings = {name: read(fields[name], name) if name in fields else None for name, read in _READERS.items()}
    most = {"max_tokens": settings.pop("max_tokens"), "max_completion_tokens": settings.pop("max_completion_tokens")}
    if None not in most.values():
        raise RequestError("max_tokens stands beside max_completion_tokens, expected one of them", "max_tokens")
    if not isinstance(fields.get("model"), str):
        raise RequestError(f"model is {_kind(fields.get('model'))}, expected a name", "model")
    tools = _tools(fields.get("tools", [])) if fields.get("tool_choice") != "none" else []
    return ChatRequest(
        model=fields["model"],
        messages=read_messages(fields.get("messages")),
        tools=tools,
        n=settings["n"] or 1,
        max_tokens=next((value for value in most.values() if value is not None), None),
        temperature=settings["temperature"],
        top_p=settings["top_p"],
        seed=settings["seed"],
        stop=settings["stop"] or (),
        logprobs=bool(settings["logprobs"]),
        stream=bool(settings["stream"]),
        include_usage=_include_usage(fields.get("stream_options", {}), bool(settings["stream"])),
    )


def _require_whole_characters(body: Mapping[str, Any]) -> None:
    """JSON can hold half of a surrogate pair, which no tokenizer takes and no answer can repeat."""
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise RequestError(f"the body holds {half}, half a character, expected whole ones") from error


def read_messages(messages: Any) -> list[Message]:
    """A conversation that the policy is to go on with, as chat templates read it."""
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages is {_kind(messages)}, expected a list with at least one message", "messages")
    names: dict[str, str] = {}  # of the functions that were called, by the ids of the calls
    found = [_message(message, f"messages[{i}]", names) for i, message in enumerate(messages)]
    if found[-1]["role"] == "assistant":
        raise RequestError("messages ends with the assistant's turn, expected one for it to answer", "messages")
    return found


def assistant_message(content: str, calls: Sequence[Mapping[str, Any]]) -> Message:
    """What `read_messages` makes of an answer that comes back as part of a conversation.

    calls: each with `name` and `arguments`.
    """
    functions = [{"type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}} for c in calls]
    return {"role": "assistant", "content": content} | ({"tool_calls": functions} if functions else {})


def _message(message: Any, where: str, names: dict[str, str]) -> Message:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        raise RequestError(f"{where} is {_kind(message)}, expected an object with a role: {', '.join(ROLES)}", where)
    given = {key: value for key, value in message.items() if value is not None and key not in LEFT_OUT_OF_MESSAGES}
    if unknown := sorted(given.keys() - PARTS_OF_MESSAGES):
        raise RequestError(f"{where}.{unknown[0]} is not known here", f"{where}.{unknown[0]}", "unknown_parameter")
    for key in ("name", "tool_call_id"):
        if not isinstance(given.get(key, ""), str):
            raise RequestError(f"{where}.{key} is {_kind(given[key])}, expected a text", f"{where}.{key}")
    content = _content(given.get("content", ""), f"{where}.content")
    if message["role"] == "assistant":
        return assistant_message(content, _calls(given.get("tool_calls", []), f"{where}.tool_calls", names))
    if message["role"] == "tool":
        name = names.get(given.get("tool_call_id"), given.get("name"))
        return {"role": "tool", "content": content} | ({} if name is None else {"name": name})
    return {"role": "system" if message["role"] == "developer" else message["role"], "content": content}


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    raise RequestError(f"{where} is {_kind(content)}, expected a text, or parts that are texts", where)


def _calls(calls: Any, where: str, names: dict[str, str]) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise RequestError(f"{where} is {_kind(calls)}, expected a list", where)
    found = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"{where}[{i}] is {call!r}, expected a call of a function with a name", f"{where}[{i}]")
        id = call.get("id") or ""
        if not isinstance(id, str):
            raise RequestError(f"{where}[{i}].id is {_kind(id)}, expected a text", f"{where}[{i}].id")
        names[id] = function["name"]
        found.append({"name": function["name"], "arguments": _arguments(function.get("arguments", "{}"))})
    return found


def _arguments(text: Any) -> Any:
    """An object, or the text as it is where it is not one."""
    try:
        value = json.loads(text)
    except (TypeError, ValueError):
        return text
    return value if isinstance(value, dict) else text


def _tools(tools: Any) -> list[dict[str, Any]]:
    if not isinstance(tools, list):
        raise RequestError(f"tools is {_kind(tools)}, expected a list", "tools")
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"tools[{i}] is {tool!r}, expected a function with a name", f"tools[{i}]")
    return tools


def _include_usage(options: Any, stream: bool) -> bool:
    if not isinstance(options, Mapping) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise RequestError(f"stream_options is {options!r}, expected an object with include_usage", "stream_options")
    if options and not stream:
        raise RequestError("stream_options is set without stream", "stream_options")
    return options.get("include_usage") is True


def _whole(low: int, high: float = math.inf) -> Callable[[Any, str], int]:
    def read(value: Any, name: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            most = "" if high == math.inf else f" to {high}"
            raise RequestError(f"{name} is {value!r}, expected an integer from {low}{most}", name)
        return value

    return read


def _number(low: float, high: float) -> Callable[[Any, str], float]:
    def read(value: Any, name: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise RequestError(f"{name} is {value!r}, expected a number from {low} to {high}", name)
        return float(value)

    return read


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {value!r}, expected true or false", name)
    return value


def _stop(value: Any, name: str) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > MOST_STOPS or not all(isinstance(t, str) and t for t in texts):
        raise RequestError(f"stop is {value!r}, expected at most {MOST_STOPS} texts that are not empty", name)
    return tuple(texts)


_READERS: dict[str, Callable[[Any, str], Any]] = {
    "n": _whole(1, MOST_CHOICES),
    "max_tokens": _whole(1, 2**63 - 1),
    "max_completion_tokens": _whole(1, 2**63 - 1),
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "seed": _whole(-(2**63), 2**63 - 1),
    "stop": _stop,
    "logprobs": _flag,
    "stream": _flag,
}


def _kind(value: Any) -> str:
    return "missing" if value is None else f"{type(value).__name__} {str(value)[:80]}"
