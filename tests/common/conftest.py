"""Databases of both kinds."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from services.common.jobs import Jobs
from services.finetune.store import Store
from tests.common.databases import postgres
from tests.common.jobbing import make


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/test.db"
    return _database(request.getfixturevalue("postgres_url"))


@pytest.fixture()
def fresh_postgres(postgres_url: str) -> str:
    """An empty PostgreSQL database."""
    return _database(postgres_url)


def _database(server: str) -> str:
    url = sa.make_url(server)
    name = "t" + uuid.uuid4().hex
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as db:
        db.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return url.set(database=name).render_as_string(hide_password=False)


@pytest.fixture()
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/test.db"


@pytest.fixture()
def jobs(sqlite_url: str, file_store: Store, tmp_path: Path) -> Jobs:
    """The jobs of one service, not yet supervised."""
    return make(sqlite_url, file_store, tmp_path)
