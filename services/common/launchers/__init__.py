"""Where workers and engine servers run: one port, an adapter for each kind of place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from services.common.settings import Settings

Handle = dict[str, Any]
"""What finds a started process again, also after a restart of the service; plain JSON."""


class Launcher(Protocol):
    """Starts processes that outlive the service.

    An adapter whose place is out of reach for now raises Unavailable; nothing is known then, and asking again is right.
    """

    def launch(self, command: Sequence[str], name: str, env: Mapping[str, str]) -> Handle:
        """Start a process with `env` added to its environment. `name` is of this one attempt; no other ever has it.

        The first word of `command` is this machine's Python; another place has its own.
        """

    def find(self, name: str, claim: Mapping[str, Any] | None) -> Handle | None:
        """A process launched as `name` whose handle was never noted, for the service was cut.

        `claim` is what the process told of itself in the store (services.finetune.progress), if it came that far. None
        if no such process is known; it may still turn up, and the fence will stop it.
        """

    def alive(self, handle: Handle) -> bool:
        """Whether the process is still there, or still on its way."""

    def disrupted(self, handle: Handle) -> bool:
        """Of one that is not alive: whether its place took it away (eviction, a lost node), through no fault of its own."""

    def trouble(self, handle: Handle) -> str:
        """What keeps it from starting, for a person to act on; empty if nothing does."""

    def stop(self, handle: Handle, grace_s: float) -> None:
        """Ask it to end (SIGTERM) and make it end (SIGKILL) after `grace_s`. Returns at once; call it once."""

    def tail(self, name: str, lines: int) -> str:
        """The last lines that the process printed, and how its place says it ended."""


def open_launcher(settings: Settings) -> Launcher:
    """The adapter that the settings ask for."""
    if settings.launcher == "kubernetes":
        from services.common.launchers.kubernetes import KubernetesLauncher

        return KubernetesLauncher(settings.namespace, settings.blueprint)
    from services.common.launchers.local import LocalLauncher

    return LocalLauncher(Path(settings.home))
