"""What docs/serve.md shows runs as it is written there."""

from __future__ import annotations

import re
import types
from pathlib import Path

import pytest

from fastppo.serve.request import ONLY, WITHOUT_EFFECT, read_request
from tests.envs.test_program import play
from tests.serve.models import make_random_engine
from tests.serve.test_request import LEAST
from tests.serve.test_server import serving

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "serve.md").read_text()


@pytest.fixture(scope="module")
def shown():
    pytest.importorskip("openai", reason="the openai client is not installed")
    module = types.ModuleType("serve_of_the_docs")
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(block, "docs/serve.md", "exec"), module.__dict__)
    return module


def test_the_client(shown):
    with serving(make_random_engine()) as client:
        assert len(shown.talk(str(client.base_url), client.api_key, "m")) == 2


def test_the_agent(shown):
    played = play(shown.agent, make_random_engine())
    assert [episode.error for episode in played.episodes] == [None] * 4
    assert all(len(episode.turns) == 2 and episode.total_reward in (0, 1) for episode in played.episodes)


def test_every_parameter_is_named():
    known = {name for name in WITHOUT_EFFECT if f"`{name}`" in TEXT}
    assert known == WITHOUT_EFFECT and "`top_logprobs`" in TEXT and "top_logprobs" in ONLY
    table = re.findall(r"^\| (`.*?) \|", TEXT, re.MULTILINE)
    values = {
        "messages": LEAST["messages"],
        "stop": "x",
        "stream": True,
        "logprobs": True,
        "tool_choice": "none",
        "tools": [],
    }
    for name in (name for row in table for name in re.findall(r"`(\w+)`", row) if name not in WITHOUT_EFFECT):
        read_request(LEAST | {name: values.get(name, 1)})
