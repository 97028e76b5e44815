"""What a client is sent: chat completions, whole or in chunks, as OpenAI's API has them."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

from fastppo.serve.request import ChatRequest
from fastppo.serve.ticket import Done, Piece, Reply


class Answer:
    """One answer to one request.

    Args:
        model: the name of the policy.
    """

    def __init__(self, request: ChatRequest, model: str) -> None:
        self._request = request
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, done: Done) -> dict[str, Any]:
        choices = [
            {
                "index": reply.choice,
                "message": _message(reply),
                "logprobs": _logprobs(reply),
                "finish_reason": reply.finish_reason,
            }
            for reply in done.replies
        ]
        return self._head | {"object": "chat.completion", "choices": choices, "usage": _usage(done)}

    def first_chunks(self) -> Iterator[str]:
        for choice in range(self._request.n):
            yield self._chunk(choice, {"role": "assistant", "content": ""})

    def chunk(self, piece: Piece) -> str:
        return self._chunk(piece.choice, {"content": piece.text})

    def last_chunks(self, done: Done) -> Iterator[str]:
        """What no chunk has said yet: log-probs, calls of tools, why each choice ended, and the numbers of tokens where they were asked for."""
        for reply in done.replies:
            message = _message(reply)
            delta = {key: message[key] for key in ("reasoning_content",) if key in message}
            if "tool_calls" in message:
                delta["tool_calls"] = [{"index": i} | call for i, call in enumerate(message["tool_calls"])]
            if reply.rest:
                delta["content"] = reply.rest
            if delta or reply.logprobs is not None:
                yield self._chunk(reply.choice, delta, logprobs=_logprobs(reply))
            yield self._chunk(reply.choice, {}, reply.finish_reason)
        if self._request.include_usage:
            yield event(self._head | {"object": "chat.completion.chunk", "choices": [], "usage": _usage(done)})
        yield "data: [DONE]\n\n"

    def _chunk(
        self, choice: int, delta: dict[str, Any], reason: str | None = None, logprobs: dict[str, Any] | None = None
    ) -> str:
        choices = [{"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason}]
        return event(self._head | {"object": "chat.completion.chunk", "choices": choices})


def event(body: dict[str, Any]) -> str:
    """As a server-sent event."""
    return f"data: {json.dumps(body)}\n\n"


def _message(reply: Reply) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.content, "refusal": None}
    if reply.reasoning:
        message["reasoning_content"] = reply.reasoning
    if reply.tool_calls:
        message["content"] = reply.content or None
        message["tool_calls"] = [
            {
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {"name": call["name"], "arguments": _as_text(call["arguments"])},
            }
            for call in reply.tool_calls
        ]
    return message


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments)


def _logprobs(reply: Reply) -> dict[str, Any] | None:
    if reply.logprobs is None:
        return None
    return {
        "content": [
            {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
            for text, value in reply.logprobs
        ]
    }


def _usage(done: Done) -> dict[str, int]:
    new = sum(len(reply.tokens) for reply in done.replies)
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": new,
        "total_tokens": done.prompt_tokens + new,
    }
