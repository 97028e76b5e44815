"""A client of a few lines, for programs of tests: the standard library alone."""

from __future__ import annotations

import json
import urllib.error
import urllib.request


def ask(base_url: str, api_key: str, messages, **settings) -> dict:
    """The answer to a conversation (a text is the user's message). Raises urllib's HTTPError where it is refused."""
    messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    body = {"model": "policy", "messages": messages} | settings
    request = urllib.request.Request(
        f"{base_url}/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {api_key}"},
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def error_of(error: urllib.error.HTTPError) -> dict:
    """What the server says of it."""
    return json.load(error)["error"]


def said(answer: dict, choice: int = 0) -> dict:
    return answer["choices"][choice]["message"]
