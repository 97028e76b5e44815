"""Environments and tools that other processes serve: MCP over their standard streams, OpenEnv over WebSockets; also where these die or hang."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from fastppo.environment_config import EnvironmentConfig
from fastppo.envs import EpisodePlayer
from fastppo.envs.adapters import MCP, OpenEnv
from fastppo.envs.environment import ToolGone
from fastppo.envs.source import rewards_of
from fastppo.envs.tools import has_tools
from fastppo.rollout import FinishReason
from tests.envs.worlds import make_engine, play

HERE = Path(__file__).resolve().parent
PATHS = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@pytest.fixture(autouse=True)
def nothing_leaks():
    """No process and no thread stays."""
    before, threads = set(psutil.Process().children()), set(threading.enumerate())
    yield
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and (
        set(psutil.Process().children()) - before or set(threading.enumerate()) - threads
    ):
        time.sleep(0.02)
    assert set(psutil.Process().children()) == before and set(threading.enumerate()) <= threads


# MCP


@pytest.fixture(scope="module")
def served():
    pytest.importorskip("mcp", reason="pip install fastppo[mcp]")
    return MCP([sys.executable, str(HERE / "mcp_server.py")], variables=PATHS)


def call(name, **arguments):
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


async def answer(environment, name, **arguments):
    """What the tool says."""
    observation, reward, terminated, truncated, _ = await environment.step(call(name, **arguments))
    assert (reward, terminated, truncated) == (0.0, False, False) and len(observation) == 1
    assert observation[0]["role"] == "tool" and observation[0]["name"] == name
    return observation[0]["content"]


async def open_server(made):
    environment = made()
    await environment.reset({}, 0)
    return environment


def server_of_this_process():
    found = set()
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # it has ended meanwhile
            if "mcp_server.py" in " ".join(child.cmdline()):
                found.add(child)
    return found


def test_tools_of_a_server(served):
    async def talk():
        server = await open_server(served)
        try:
            tools = {tool["function"]["name"]: tool["function"] for tool in server.tools}
            assert tools.keys() == {"add", "memory", "fail", "die", "hang"}
            assert tools["add"]["description"] == "Adds two numbers."
            assert tools["add"]["parameters"]["properties"]["a"]["type"] == "integer"
            assert await answer(server, "add", a=1, b=2) == "3"
            assert (await answer(server, "add", a="x")).startswith("Error: RuntimeError: ")
            assert (await answer(server, "fail")).startswith("Error: RuntimeError: ")
            assert "there is no tool 'sub', expected one of add" in await answer(server, "sub")
            assert (await server.step({"content": "3"}))[2]
            await server.reset({}, 1)
            assert await answer(server, "memory") == "[3]"  # kept for the next episode
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(answer(server, "hang"), 0.5)
        finally:
            server.close()
        assert not server_of_this_process()

    asyncio.run(talk())


def test_a_server_that_dies_ends_the_episode_and_the_next_has_a_fresh_one(served):
    async def talk():
        server = await open_server(served)
        with pytest.raises(ToolGone, match="the MCP server .* is gone: Connection closed"):
            await answer(server, "die")
        server.close()
        fresh = MCP([sys.executable, str(HERE / "mcp_server.py")], variables=PATHS, restart=True)()
        await fresh.reset({}, 0)
        assert await answer(fresh, "add", a=1, b=1) == "2"
        await fresh.reset({}, 1)
        assert await answer(fresh, "memory") == "[]"
        fresh.close()

    asyncio.run(talk())


def test_a_server_is_closed_from_another_thread_while_a_call_hangs(served):
    async def talk():
        server = await open_server(served)
        threading.Timer(0.5, server.close).start()
        with pytest.raises((ToolGone, asyncio.CancelledError)):
            await answer(server, "hang")

    asyncio.run(talk())
    deadline = time.monotonic() + 20
    while server_of_this_process() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not server_of_this_process()


def test_a_program_that_is_no_server(served):
    async def talk():
        silent = MCP([sys.executable, "-c", "import time; time.sleep(600)"])()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(silent.reset({}, 0), 1)
        silent.close()
        ended = MCP([sys.executable, "-c", ""])()
        with pytest.raises(ConnectionError, match=" -c  does not begin as an MCP server: Connection closed"):
            await ended.reset({}, 0)
        ended.close()

    asyncio.run(talk())


def test_tools_of_a_server_pay_nothing(served):
    assert has_tools(served)
    with pytest.raises(ValueError, match="None pays nothing"):
        rewards_of(None, served)


@pytest.mark.parametrize(
    ("command", "error", "message"),
    [
        ("python server.py", TypeError, "command is 'python server.py', expected a list: the program and its arg"),
        ([], TypeError, "command is .., expected a list"),
        (["no-such-program", "x"], ValueError, "there is no program 'no-such-program'"),
    ],
)
def test_a_command_that_is_none(served, command, error, message):
    with pytest.raises(error, match=message):
        MCP(command)


# OpenEnv


@pytest.fixture
def server():
    """(url, process)"""
    pytest.importorskip("openenv.core.generic_client", reason="pip install fastppo[openenv]")
    process = subprocess.Popen(
        [sys.executable, str(HERE / "openenv_server.py")], stdout=subprocess.PIPE, env=os.environ | PATHS
    )
    yield f"http://127.0.0.1:{int(process.stdout.readline())}", process
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_a_session_of_a_server(server):
    async def talk():
        session = OpenEnv(server[0], "message", "text")()
        assert await session.reset({"prompt": "Play.", "level": 2}, 5) == "Play.\n5 2"
        assert await session.step("abca") == ("\nacba\n", 2.0, False, False, {})
        assert await session.reset({"prompt": "Play."}, 6) == "Play.\n6 0"
        assert [(await session.step("b"))[2] for _ in range(3)] == [False, False, True]
        await session.close()
        for fields, message in {
            ("msg", "text"): "the server refuses an action whose field 'msg' .action. is a text: .*VALIDATION_ERROR",
            ("message", "txt"): "observation is 'txt', which the server's has not, expected one of text",
        }.items():
            session = OpenEnv(server[0], *fields)()
            with pytest.raises(ValueError, match=message):
                await session.reset({"prompt": ""}, 0)
                await session.step("x")
            await session.close()

    asyncio.run(talk())


def test_episodes_with_a_server_and_after_its_death(server):
    """They are paid by turn; where the server dies or hangs they are invalid, and nobody waits longer than the time limit."""
    url, process = server
    made = OpenEnv(url, "message", "text")
    played = play(made)
    for episode in played.episodes:
        assert episode.error is None and len(episode.turns) == 3
        assert [turn.reward for turn in episode.turns] == [turn.completion.count("a") for turn in episode.turns]
    process.send_signal(signal.SIGSTOP)
    engine = make_engine()
    player = EpisodePlayer(made, engine, EnvironmentConfig(call_timeout=1))
    hung = play(made, engine, player=player, rows=[{"prompt": "ab", "level": 1}])
    player.close()
    assert all("took longer than 1 s" in episode.error for episode in hung.episodes)
    process.send_signal(signal.SIGKILL)
    process.wait()
    dead = play(made, engine, rows=[{"prompt": "ab", "level": 1}])
    assert {episode.finish_reason for episode in dead.episodes} == {FinishReason.ERROR}
    assert all("reset failed: ConnectionError" in episode.error for episode in dead.episodes)
