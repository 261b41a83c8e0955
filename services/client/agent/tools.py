"""The tools that come with `quartet agent`: a calculator, a solver, and a search where an address for it is given."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.client.agent import Tool, ToolError, schema
from services.client.agent.arithmetic import calculate
from services.client.agent.solving import solve
from services.finetune.errors import InvalidArgument

SEARCH_TIMEOUT_S = 15.0
MAX_SEARCH_BYTES = 1 << 20
MOST_HITS = 10

TEXT: Mapping[str, Any] = {"type": "string"}


def calculator() -> Tool:
    wanted = schema({"expression": {**TEXT, "description": "such as (3 + 4) * sqrt(2) / 5"}})
    return Tool(
        "calculate", "Computes the value of an expression.", wanted, lambda a: calculate(_text(a, "expression"))
    )


def solver() -> Tool:
    wanted = schema(
        {"equations": {"type": "array", "items": TEXT, "description": "such as x + y = 3, which hold together"}},
        variables={"type": "array", "items": TEXT, "description": "what to solve for; all if left out"},
    )
    return Tool("solve", "Solves equations.", wanted, lambda a: solve(_texts(a, "equations"), _texts(a, "variables")))


class Search:
    """Asks a search service by GET. `url` has {query}, or `?q=` is added; `header` is sent, such as an API key."""

    def __init__(self, url: str, header_file: str = "") -> None:
        """InvalidArgument (SEARCH_INVALID)."""
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise InvalidArgument(f"--search {url}: must be an http or https address", reason="SEARCH_INVALID")
        self._url = url if "{query}" in url else f"{url}{'&' if '?' in url else '?'}q={{query}}"
        self._headers = {"accept": "application/json"}
        if header_file:
            name, colon, value = Path(header_file).read_text().strip().partition(":")
            if not colon or "\n" in value:
                raise InvalidArgument(f"{header_file} must hold one line, NAME: VALUE", reason="SEARCH_INVALID")
            self._headers[name.strip()] = value.strip()

    def tool(self) -> Tool:
        return Tool("search", "Searches the web.", schema({"query": TEXT}), lambda a: self.find(_text(a, "query")))

    def find(self, query: str) -> str:
        """Hits, one a line, or what the service says. ToolError."""
        url = self._url.replace("{query}", urllib.parse.quote(query, safe=""))
        try:
            request = urllib.request.Request(url, headers=self._headers)
            with urllib.request.build_opener(_Stay).open(request, timeout=SEARCH_TIMEOUT_S) as answer:
                data = answer.read(MAX_SEARCH_BYTES)
        except urllib.error.HTTPError as error:
            with error:
                raise ToolError(f"the search failed: status {error.code}") from error
        except (OSError, ValueError) as error:
            # Not its message, which may hold the address, and that a key.
            raise ToolError(f"the search failed: {type(error).__name__}") from error
        return _hits(data.decode("utf-8", "replace"))


class _Stay(urllib.request.HTTPRedirectHandler):
    """What was configured is asked, and nobody else: a header may be a key."""

    def redirect_request(self, *given: Any, **more: Any) -> None:
        return None


def _hits(text: str) -> str:
    """The results in the JSON of SearXNG (`results`) or Serper (`organic`); other answers as they are."""
    try:
        told = json.loads(text)
    except ValueError:
        return text
    listed = told.get("results", told.get("organic")) if isinstance(told, dict) else None
    if not isinstance(listed, list):
        return text
    lines = []
    for hit in [h for h in listed if isinstance(h, dict)][:MOST_HITS]:
        parts = (hit.get("title"), hit.get("content") or hit.get("snippet"), hit.get("url") or hit.get("link"))
        lines.append(" | ".join(str(p) for p in parts if p))
    return "\n".join(lines) or "nothing was found"


def _text(arguments: Mapping[str, Any], name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ToolError(f"{name} must be a text")
    return value


def _texts(arguments: Mapping[str, Any], name: str) -> list[str]:
    value = arguments.get(name) or []
    several = [value] if isinstance(value, str) else value
    if not isinstance(several, list) or not all(isinstance(v, str) for v in several):
        raise ToolError(f"{name} must be a list of texts")
    return several
