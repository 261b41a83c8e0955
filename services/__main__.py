"""All four services in one process: python -m services. `quartet up` is this, and the gateway beside it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

from services.common import server
from services.common.settings import Settings
from services.conversion.__main__ import build as conversion
from services.datasets.__main__ import build as datasets
from services.inference.__main__ import build as inference
from services.training.__main__ import build as training

Build = Callable[[Settings], server.Room]


def _trusting(build: Build) -> Build:
    """Who can reach a loopback server may read this machine's files anyway: models are imported from any folder."""

    def built(settings: Settings) -> server.Room:
        local = settings.loopback and not settings.import_roots
        return build(replace(settings, import_roots="/") if local else settings)

    return built


def main(settings: Settings | None = None, beside: server.Beside = nullcontext) -> None:
    """Serve until SIGTERM, by the command line's flags if no settings are given."""
    builds = [_trusting(build) for build in (datasets, training, conversion, inference)]
    server.main("quartet", builds, settings, beside)


if __name__ == "__main__":
    main()
