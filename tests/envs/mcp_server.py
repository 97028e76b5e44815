"""A server of the Model Context Protocol: `python mcp_server.py`."""

from __future__ import annotations

import os
import time

from mcp.server.mcpserver import MCPServer

server = MCPServer("tests", log_level="CRITICAL")
added = []


@server.tool()
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    added.append(a + b)
    return a + b


@server.tool()
def memory() -> str:
    """Says all that was added."""
    return str(added)


@server.tool()
def fail() -> str:
    """Fails."""
    raise ValueError("no luck")


@server.tool()
def die() -> str:
    """Ends the server."""
    os._exit(3)


@server.tool()
def hang() -> str:
    """Does not answer."""
    time.sleep(600)
    return ""


if __name__ == "__main__":
    server.run()
