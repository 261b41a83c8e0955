"""Where workers and engine servers run: one port, an adapter for each kind of place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Handle = dict[str, Any]
"""What finds a started process again, also after a restart of the service; plain JSON."""


class Launcher(Protocol):
    """Starts processes that outlive the service."""

    def launch(self, command: Sequence[str], name: str, env: Mapping[str, str]) -> Handle:
        """Start a process with `env` added to the service's own environment."""

    def alive(self, handle: Handle) -> bool:
        """Whether the process is still there."""

    def stop(self, handle: Handle, grace_s: float) -> None:
        """Ask it to end (SIGTERM) and make it end (SIGKILL) after `grace_s`. Returns at once; call it once."""

    def tail(self, name: str, lines: int) -> str:
        """The last lines that the process printed."""
