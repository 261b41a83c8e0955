"""A server of the MCP library's own, over its standard streams or, with a port, over http."""

from __future__ import annotations

import sys

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("words")


@server.tool()
def reverse(text: str) -> str:
    """Turns a text around."""
    return text[::-1]


@server.tool(name="fail/now")
def fail() -> str:
    """Fails."""
    raise ToolError("no such luck")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server.run("stdio")
