"""Where workers and engine servers run: one port, an adapter for each kind of place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from services.common.settings import Settings

Handle = dict[str, Any]
"""What finds a started process again, also after a restart of the service; plain JSON."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How much of a place one attempt takes: `nodes` machines at once, each with so many GPUs."""

    nodes: int = 1
    gpus_per_node: int = 0
    """0 is what the place gives by itself: a machine all it has, a blueprint what it says."""


ONE = Shape()


class Launcher(Protocol):
    """Starts processes that outlive the service.

    An adapter whose place is out of reach for now raises Unavailable; nothing is known then, and asking again is right.
    """

    def launch(self, command: Sequence[str], name: str, env: Mapping[str, str], shape: Shape = ONE) -> Handle:
        """Start a process with `env` added to its environment. `name` is of this one attempt; no other ever has it.

        The first word of `command` is this machine's Python; another place has its own. With several nodes each has such
        a process, and NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT as torchrun names them: they live and die as one.
        FailedPrecondition (SHAPE_UNAVAILABLE) if the place never has that much.
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

    def broken(self, handle: Handle) -> bool:
        """Of one that was told to leave: whether that was because another process of its attempt failed."""

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
