"""Tools of a Model Context Protocol server, which is a process that reads and writes JSON-RPC on its standard streams."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any

from fastppo.envs.adapters.optional import imported
from fastppo.envs.environment import Observation, ToolGone
from fastppo.envs.tools import ToolDialogue, ToolMaker


class MCP(ToolMaker):
    """Makes environments with the tools of an MCP server: `MCP(["python", "server.py"])`.

    Each environment has a server process of its own, which it starts at its first episode and ends when it is closed. What the server calls an error
    the model reads; a server that dies or does not answer in `environment.call_timeout` costs its episode, and the next one has a new server.

    Args:
        command: program and arguments.
        variables: environment variables of the server besides PATH, HOME and the like.
        restart: whether each episode has a fresh server, for one that remembers what was done.

    Raises:
        ImportError: mcp is missing. TypeError: the command is no list of texts. ValueError: its program is not there.
    """

    def __init__(
        self, command: Sequence[str], variables: Mapping[str, str] | None = None, restart: bool = False
    ) -> None:
        self._library, self._restart = imported("mcp", "mcp"), restart
        if isinstance(command, str) or not command or not all(isinstance(part, str) for part in command):
            raise TypeError(f"command is {command!r}, expected a list: the program and its arguments")
        if shutil.which(command[0]) is None:
            raise ValueError(f"command is {list(command)}, but there is no program {command[0]!r}")
        self._server = self._library.StdioServerParameters(
            command=command[0], args=list(command[1:]), env=dict(variables or {})
        )

    def __call__(self) -> MCPServer:
        return MCPServer(self._library, self._server, self._restart)


class MCPServer(ToolDialogue):
    """One server process. Its client lives in a thread and an event loop of its own, so that it can be closed from any thread."""

    def __init__(self, library: Any, parameters: Any, restart: bool) -> None:
        self._library, self._parameters, self._restart = library, parameters, restart
        self._open = ExitStack()
        self._portal: Any = None
        self.tools = []

    async def reset(self, row: Mapping[str, Any], seed: int) -> Observation:
        """The row's prompt. Raises ConnectionError where the program does not begin as a server."""
        if self._restart:
            self.close()
        if self._portal is None:
            await self._start()
        return None

    async def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Raises ToolGone where the server is gone, RuntimeError with what it says where it calls the result an error."""
        try:
            called = self._portal.start_task_soon(self._client.call_tool, name, dict(arguments))
            result = await asyncio.wrap_future(called)
        except self._library.MCPError as error:
            if error.code == imported("mcp_types", "mcp").CONNECTION_CLOSED:
                raise ToolGone(f"the MCP server {self._parameters.command} is gone: {error}") from error
            raise
        said = "\n".join(part.text if part.type == "text" else f"({part.type})" for part in result.content)
        if result.is_error:
            raise RuntimeError(said)
        return said

    def close(self) -> None:
        """End the process, by force where it does not end by itself."""
        self._portal = None
        self._open.close()

    async def _start(self) -> None:
        portal = self._open.enter_context(imported("anyio.from_thread", "mcp").start_blocking_portal())
        listed: Future[tuple[Any, list[Any]]] = Future()
        served = portal.start_task_soon(self._serve, listed)
        self._open.callback(served.cancel)
        self._portal = portal
        try:
            self._client, tools = await asyncio.wrap_future(listed)
        except ConnectionError:
            self.close()
            raise
        self.tools = [_schema(tool) for tool in tools]

    async def _serve(self, listed: Future[tuple[Any, list[Any]]]) -> None:
        """Until it is cancelled."""
        try:
            async with self._library.Client(self._parameters) as client:
                listed.set_result((client, await _list_tools(client)))
                await asyncio.Event().wait()
        except Exception as error:
            if not listed.done():
                command = " ".join([self._parameters.command, *self._parameters.args])
                listed.set_exception(ConnectionError(f"{command} does not begin as an MCP server: {_cause(error)}"))


async def _list_tools(client: Any) -> list[Any]:
    """Those of all pages."""
    page = await client.list_tools()
    tools = list(page.tools)
    while page.next_cursor:
        page = await client.list_tools(cursor=page.next_cursor)
        tools += page.tools
    return tools


def _cause(error: BaseException) -> BaseException:
    """The first error of a group."""
    while inner := getattr(error, "exceptions", None):
        error = inner[0]
    return error


def _schema(tool: Any) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
    return {"type": "function", "function": function}
