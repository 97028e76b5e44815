"""A reward from a server: a real one on this machine, that answers well, badly, late or not at all."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import socket
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fastppo.rewards import RewardRunner, http
from tests.rewards.conftest import assert_all_invalid

MODULE = sys.modules[http.__module__]
LENGTHS = [3.0, 5.0, 5.0]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(MODULE, "FIRST_PAUSE", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def serve():
    """serve(answer) -> (url, requests): `answer(number, body)` gives (status, bytes); `requests` grows by (headers, body)."""
    servers = []

    def start(answer):
        requests, lock = [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    requests.append((dict(self.headers), body))
                    number = len(requests)
                status, content = answer(number, body)
                with contextlib.suppress(OSError):  # whoever asked has given up
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/score?key=s3cret", requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def lengths(number, body):
    return 200, json.dumps([len(text) for text in body["completions"]]).encode()


def ask(make, url, limit=None, columns=None, **options):
    runner = make(partial(http, url=url, **options), limit, retries=0)
    texts = ["one", "three", "seven"]
    return runner(["a", "b", "c"], texts, columns or {}, completion_ids=[[1]] * 3)


@pytest.mark.parametrize("limit", [20.0, None], ids=["forked", "in-process"])
def test_what_is_sent_and_what_comes_back(make, serve, limit):
    url, requests = serve(lengths)
    columns = {"answer": [1, None, {"x": [2]}], "url": ["u", "v", "w"]}
    result = ask(make, url, limit, columns, headers={"Authorization": "Bearer s3cret"})
    assert result.scores == LENGTHS and result.errors == []
    ((headers, body),) = requests
    assert headers["Authorization"] == "Bearer s3cret" and headers["Content-Type"] == "application/json"
    assert body == {
        "prompts": ["a", "b", "c"],
        "completions": ["one", "three", "seven"],
        "answer": [1, None, {"x": [2]}],
    }


def test_batches_come_back_in_order(make, serve):
    def slow_first(number, body):
        time.sleep(0.1 if body["completions"] == ["one", "three"] else 0)
        return lengths(number, body)

    url, requests = serve(slow_first)
    assert ask(make, url, batch_size=2).scores == LENGTHS
    assert sorted(len(body["prompts"]) for _, body in requests) == [1, 2]


def test_null_does_not_apply_and_nan_is_invalid(make, serve):
    url, _ = serve(lambda number, body: (200, b"[1.5, null, NaN]"))
    result = ask(make, url)
    assert result.scores[0] == 1.5 and all(map(math.isnan, result.scores[1:]))
    assert "no reward applies" in "\n".join(result.errors) and "NaN or infinity for 1 of 3" in "\n".join(result.errors)


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_status_that_passes_is_tried_again(make, serve, status):
    url, requests = serve(lambda number, body: (status, b"later") if number < 3 else lengths(number, body))
    assert ask(make, url, retries=2).scores == LENGTHS and len(requests) == 3


def test_a_status_that_stays_is_invalid(make, serve):
    url, requests = serve(lambda number, body: (500, b"out of cheese"))
    assert_all_invalid(ask(make, url, retries=1), "/score answered with status 500: out of cheese")
    assert len(requests) == 2


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((404, b"no such path"), "answered with status 404: no such path"),
        ((401, b""), "status 401"),
        ((200, b"[1, 2]"), "answered with a list of 2, expected a list of 3 numbers or null"),
        ((200, b'{"scores": [1, 2, 3]}'), "answered with dict, expected a list of 3"),
        ((200, b"<html>"), "answered with something other than JSON: b'<html>'"),
        ((200, b""), "something other than JSON"),
        ((200, b'[1, "2", 3]'), "str '2' for completion 1"),
    ],
)
def test_another_answer_is_invalid_at_once(make, serve, answer, words):
    url, requests = serve(lambda number, body: answer)
    result = ask(make, url)
    assert_all_invalid(result, words)
    assert len(requests) == 1 and "s3cret" not in "\n".join(result.errors)


def test_a_server_that_is_silent_is_given_up(make, serve):
    url, requests = serve(lambda number, body: time.sleep(1) or lengths(number, body))
    assert_all_invalid(ask(make, url, timeout=0.1, retries=1), "gave no answer", "timed out")
    assert len(requests) == 2


def test_a_server_that_is_not_there_is_invalid(make, serve):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/score?key=s3cret"
    result = ask(make, url, retries=1)
    assert_all_invalid(result, "gave no answer", "refused")
    assert "s3cret" not in "\n".join(result.errors)


def test_a_connection_that_breaks_off_is_invalid(make):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up():
            with contextlib.suppress(OSError):
                while True:
                    server.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        result = ask(make, f"http://127.0.0.1:{server.getsockname()[1]}/", retries=1)
        assert_all_invalid(result, "gave no answer")


def test_a_column_that_json_cannot_hold_is_named(make, serve):
    url, _ = serve(lengths)
    assert_all_invalid(ask(make, url, columns={"day": [datetime.date(2026, 1, 1)] * 3}), "column 'day' holds what JSON")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs url"),
        ({"url": "file:///etc/passwd"}, "url is 'file:///etc/passwd', expected http://HOST/PATH"),
        ({"url": "localhost:80"}, "expected http://HOST/PATH"),
        ({"url": "http://h:port/"}, "expected http://HOST/PATH"),
        ({"url": "http://me:pw@h/"}, "url is 'str', expected"),
        ({"url": 3}, "url is 'int'"),
        ({"url": "http://h", "timeout": 0}, "timeout is 0, expected a finite number of seconds"),
        ({"url": "http://h", "timeout": math.nan}, "timeout is nan"),
        ({"url": "http://h", "retries": -1}, "retries is -1, expected an integer >= 0"),
        ({"url": "http://h", "batch_size": 0}, "batch_size is 0, expected an integer >= 1"),
        ({"url": "http://h", "headers": ["a"]}, "headers is list, expected a mapping"),
        ({"url": "http://h", "headers": {"a": 1}}, "headers is dict, expected a mapping from names to texts"),
    ],
)
def test_options_are_checked_when_the_runner_is_made(options, message):
    with pytest.raises(ValueError, match=f"reward 'http'.*{message}"):
        RewardRunner(partial(http, **options), timeout=None)
