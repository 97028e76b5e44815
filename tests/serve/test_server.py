"""What the real `openai` client is answered by a policy of ours."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest

from fastppo.envs import Dialogue
from fastppo.rollout import Engine, SamplingParams
from fastppo.serve import ChatServer, ChatService
from tests.envs.chat import chat_of
from tests.serve.client import ask, error_of, said
from tests.serve.models import make_random_engine, make_saying_engine

pytest.importorskip("starlette", reason="starlette is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
openai = pytest.importorskip("openai", reason="the openai client is not installed")

USER = [{"role": "user", "content": "hi"}]
LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"where": {"type": "string"}}},
    },
}


@contextmanager
def serving(engine: Engine, key: str = "secret"):
    """A client of a policy called m. In the end nothing of the server is left."""
    inbox: SimpleQueue = SimpleQueue()
    server = ChatServer("m", inbox, lambda given: given if given == key else None)
    speech = Dialogue(engine.tokenizer, chat_of(engine.tokenizer))
    service = ChatService(engine, speech, "m", SamplingParams(max_new_tokens=400), inbox)
    before = set(threading.enumerate())
    over, base_url = threading.Event(), server.open()
    thread = threading.Thread(target=service.run, args=(over.is_set,))
    thread.start()
    try:
        with openai.OpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=300) as client:
            yield client
    finally:
        over.set()
        thread.join()
        server.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((urlsplit(base_url).hostname, urlsplit(base_url).port)).close()


@pytest.fixture(scope="module")
def engine():
    return make_random_engine()


@pytest.fixture(scope="module")
def client(engine):
    with serving(engine) as client:
        yield client


@pytest.fixture(scope="module")
def saying():
    with serving(make_saying_engine("Some fun")) as client:
        yield client


def texts(answer) -> list[str]:
    return [choice.message.content for choice in answer.choices]


def test_an_answer(saying):
    answer = saying.chat.completions.create(model="m", messages=USER)
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason, choice.logprobs) == ("Some fun", "stop", None)
    usage = answer.usage
    assert usage.completion_tokens == 9 and usage.total_tokens == usage.prompt_tokens + 9
    assert answer.model == "m" and [model.id for model in saying.models.list()] == ["m"]


def test_how_much_is_said(saying):
    cut = saying.chat.completions.create(model="m", messages=USER, max_tokens=3).choices[0]
    assert (cut.message.content, cut.finish_reason) == ("Som", "length")
    stopped = saying.chat.completions.create(model="m", messages=USER, stop=["x", "e f"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("Som", "stop")


def test_a_stream_says_the_same(saying):
    def stream(**settings):
        chunks = list(saying.chat.completions.create(model="m", messages=USER, stream=True, **settings))
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        return pieces, [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1], chunks[-1]

    pieces, reason, last = stream(stream_options={"include_usage": True})
    assert "".join(pieces) == "Some fun" and len([piece for piece in pieces if piece]) == 8 and reason == "stop"
    assert last.usage.completion_tokens == 9
    pieces, reason, _ = stream(stop="e f")
    assert "".join(pieces) == "Som" and reason == "stop"  # nothing of a stop is told
    pieces, reason, _ = stream(stop="unx")
    assert "".join(pieces) == "Some fun"  # what might have become one is


def test_choices_and_seeds(client):
    """A seed says the same again, whoever asks meanwhile; choices and seeds differ."""

    def ask(seed, n=3):
        return texts(client.chat.completions.create(model="m", messages=USER, n=n, seed=seed, max_tokens=20))

    alone = ask(5)
    assert len(set(alone)) == 3 and alone == ask(5) and alone != ask(6)
    assert ask(None, n=1) != ask(None, n=1)
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, [5, 7, 5, 8, 9, 5]))[::2] != [alone] and ask(5) == alone


def test_requests_are_sampled_side_by_side_each_in_its_own_way(engine, client):
    greedy = client.chat.completions.create(model="m", messages=USER, temperature=0, max_tokens=60)
    with ThreadPoolExecutor(6) as pool:
        options = [{"temperature": 0}, {"temperature": 1.5, "top_p": 0.9}, {"seed": 1}] * 2
        asked = [
            pool.submit(client.chat.completions.create, model="m", messages=USER, max_tokens=60, **more)
            for more in options
        ]
        answers = [one.result() for one in asked]
    assert texts(answers[0]) == texts(answers[3]) == texts(greedy) and texts(answers[2]) == texts(answers[5])
    assert engine.stats.occupancy > 1.5 / engine.max_batch_size


@pytest.mark.parametrize("stream", [False, True])
def test_log_probs_are_those_that_the_sampler_drew_with(engine, client, stream):
    prompt = engine.tokenizer.apply_chat_template(USER, add_generation_prompt=True)["input_ids"]
    expected = engine.generate([prompt], SamplingParams(temperature=0, max_new_tokens=12))
    settings = dict(model="m", messages=USER, temperature=0, max_tokens=12, logprobs=True, stream=stream)
    said = client.chat.completions.create(**settings)
    chunks = list(said) if stream else [said]
    found = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [token.logprob for token in found] == expected.logprobs.tolist()
    assert [token.token for token in found] == [engine.tokenizer.decode([i]) for i in expected.completions()[0]]


def test_a_call_of_a_tool_and_its_answer():
    with serving(make_saying_engine("So [up]")) as client:
        answer = client.chat.completions.create(model="m", messages=USER, tools=[LOOK])
        message, reason = answer.choices[0].message, answer.choices[0].finish_reason
        call = message.tool_calls[0]
        assert reason == "tool_calls" and call.function.name == "look" and call.function.arguments == '{"where": "up"}'
        back = [*USER, message, {"role": "tool", "tool_call_id": call.id, "content": "blue"}]
        again = client.chat.completions.create(model="m", messages=back, tools=[LOOK])
        assert again.usage.prompt_tokens > answer.usage.prompt_tokens
        without = client.chat.completions.create(model="m", messages=USER)
        assert without.choices[0].message.content == "So [up]"
        chunks = list(client.chat.completions.create(model="m", messages=USER, tools=[LOOK], stream=True))
        calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        assert [call.function.arguments for call in calls] == ['{"where": "up"}']


def test_what_is_refused_is_an_error_of_the_client(client):
    def refused(kind, **settings):
        with pytest.raises(kind) as error:
            client.chat.completions.create(**{"model": "m", "messages": USER} | settings)
        return error.value

    assert refused(openai.BadRequestError, top_logprobs=5, logprobs=True).param == "top_logprobs"
    assert refused(openai.NotFoundError, model="gpt-9").code == "model_not_found"
    assert refused(openai.BadRequestError, stream=True, temperature=-1).param == "temperature"
    long = [{"role": "user", "content": "x" * 600}]
    assert refused(openai.BadRequestError, messages=long).code == "context_length_exceeded"
    with openai.OpenAI(base_url=str(client.base_url), api_key="another", max_retries=0) as other:
        with pytest.raises(openai.AuthenticationError, match="API key"):
            other.models.list()
    with pytest.raises(openai.NotFoundError, match="only GET /v1/models"):
        client.embeddings.create(model="m", input="x")


def test_what_no_tokenizer_takes_leaves_the_server_alive(client):
    base_url = str(client.base_url).rstrip("/")
    with pytest.raises(HTTPError) as half:
        ask(base_url, "secret", "a\ud83d", model="m")
    assert half.value.code == 400 and "half a character" in error_of(half.value)["message"]
    request = Request(f"{base_url}/chat/completions", b"[" * 100_000, {"Authorization": "Bearer secret"})
    with pytest.raises(HTTPError) as deep:
        urlopen(request)
    assert deep.value.code == 400 and "the body is not JSON that can be read" in error_of(deep.value)["message"]
    assert said(ask(base_url, "secret", "hi", model="m", max_tokens=1))["role"] == "assistant"


def test_nothing_more_is_sampled_for_a_client_that_has_gone():
    engine = make_random_engine()
    with serving(engine) as client:
        stream = client.chat.completions.create(model="m", messages=USER, max_tokens=400, stream=True)
        next(iter(stream))
        stats = engine.stats
        stream.close()
        seen = -1
        while seen != stats.new_tokens:
            seen = stats.new_tokens
            time.sleep(0.5)
    assert 1 <= seen < 400
