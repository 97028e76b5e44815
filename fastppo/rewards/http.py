"""A reward that a server computes: a batch of completions is posted to it as JSON, and it answers with a list of scores."""

from __future__ import annotations

import json
import math
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any

FIRST_PAUSE = 0.5  # seconds before the first retry; each next one waits twice as long
CONCURRENT_REQUESTS = 8
SHOWN_CHARACTERS = 200
WORTH_A_RETRY = (408, 425, 429, 500, 502, 503, 504)


class BadAnswer(ValueError):
    """The server answered with something other than a list of scores."""


def http(
    prompts: list,
    completions: list,
    *,
    url: str,
    timeout: float = 20.0,
    retries: int = 3,
    batch_size: int = 64,
    headers: Mapping[str, str] | None = None,
    **columns: Any,
) -> list[float | None]:
    """What the server at `url` says of the completions.

    It is sent `{"prompts": [...], "completions": [...], "<column>": [...], ...}` with every column of the data (not the token ids) by POST, and
    answers with a JSON list of one number or null (does not apply) for each completion.

    Args:
        url: of `http:` or `https:`.
        timeout: seconds of silence after which a request is given up. `reward.timeout` bounds the whole call, retries included.
        retries: further attempts, after 0.5, 1, 2, ... seconds, where the server cannot be reached, is silent, or answers with a status that
            may pass (408, 425, 429, 500, 502, 503, 504). Any other failure is final.
        batch_size: most completions in one request; several requests are under way at the same time.
        headers: added to each request.

    Raises:
        ValueError, TypeError: an argument is not as above, a column that JSON cannot hold, an answer of another form. OSError: the last attempt
            failed. Neither holds headers or the url's query, where secrets stand.
    """
    _check(url, timeout, retries, batch_size, headers)
    columns.pop("completion_ids", None)
    rows = {"prompts": prompts, "completions": completions, **columns}
    starts = range(0, len(completions), batch_size)
    bodies = [_body({name: values[i : i + batch_size] for name, values in rows.items()}) for i in starts]
    sizes = [len(completions[i : i + batch_size]) for i in starts]

    def ask(body: bytes, size: int) -> list[float | None]:
        return _with_retries(lambda: _ask(url, body, headers or {}, timeout, size), retries)

    with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
        return [score for scores in pool.map(ask, bodies, sizes) for score in scores]


def _with_retries(ask: Any, retries: int) -> list[float | None]:
    for attempt in range(retries):
        try:
            return ask()
        except OSError as error:
            if isinstance(error, urllib.error.HTTPError) and error.code not in WORTH_A_RETRY:
                raise
            time.sleep(FIRST_PAUSE * 2**attempt)
    return ask()


def _ask(url: str, body: bytes, headers: Mapping[str, str], timeout: float, size: int) -> list[float | None]:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            text = response.read()
    except urllib.error.HTTPError as error:
        said = error.read(SHOWN_CHARACTERS).decode(errors="replace")
        message = f"{_place(url)} answered with status {error.code}: {said}"
        raise urllib.error.HTTPError(_place(url), error.code, message, error.headers, None) from None
    except (OSError, HTTPException) as error:  # refused, silent, broken off
        raise OSError(f"{_place(url)} gave no answer: {getattr(error, 'reason', error)}") from None
    return _scores(text, size, url)


def _scores(text: bytes, size: int, url: str) -> list[float | None]:
    try:
        scores = json.loads(text)
    except ValueError as error:
        raise BadAnswer(
            f"{_place(url)} answered with something other than JSON: {text[:SHOWN_CHARACTERS]!r}"
        ) from error
    if not isinstance(scores, list) or len(scores) != size:
        found = f"a list of {len(scores)}" if isinstance(scores, list) else type(scores).__name__
        raise BadAnswer(f"{_place(url)} answered with {found}, expected a list of {size} numbers or null")
    return scores


def _body(rows: Mapping[str, list]) -> bytes:
    for name, values in rows.items():
        try:
            json.dumps(values)
        except (TypeError, ValueError) as error:
            raise TypeError(f"column {name!r} holds what JSON cannot: {error}") from error
    return json.dumps(rows).encode()


def _place(url: str) -> str:
    """The url without its query, where secrets may stand."""
    return url.partition("?")[0]


def _is_address(url: Any) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return (
            parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc and parts.port != 0
        )
    except (ValueError, TypeError, AttributeError):  # no text, or a port that is none
        return False


def _check(url: Any, timeout: Any, retries: Any, batch_size: Any, headers: Any) -> None:
    if not _is_address(url):
        shown = _place(url) if isinstance(url, str) and "@" not in url else type(url).__name__
        raise ValueError(f"url is {shown!r}, expected http://HOST/PATH or https://HOST:PORT/PATH")
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
        raise ValueError(f"timeout is {timeout!r}, expected a finite number of seconds > 0")
    for name, value, least in (("retries", retries, 0), ("batch_size", batch_size, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}, expected an integer >= {least}")
    given = headers or {}
    if not isinstance(given, Mapping) or not all(isinstance(part, str) for pair in given.items() for part in pair):
        raise ValueError(f"headers is {type(headers).__name__}, expected a mapping from names to texts")
