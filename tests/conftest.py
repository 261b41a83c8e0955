"""What every test has: the file adapter and the S3 adapter on a real server; no deadlines, which a loaded machine misses."""

from __future__ import annotations

import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from services.finetune.store import Store, open_store
from tests.seaweed import seaweed

settings.register_profile("quartet", deadline=None)
settings.load_profile("quartet")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # Under nohup interrupts are ignored, and would be by all that tests start and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The URI of a bucket on a running server; its credentials are in the environment, as for a service."""
    with seaweed() as (uri, credentials), pytest.MonkeyPatch.context() as environment:
        for name, value in credentials.items():
            environment.setenv(name, value)
        yield uri


@pytest.fixture()
def s3_uri(s3_server: str) -> str:
    """A prefix of its own for each test."""
    bucket, _, query = s3_server.partition("?")
    return f"{bucket}/{uuid.uuid4().hex}?{query}"


@pytest.fixture(params=["file", "s3"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of each kind, by URI."""
    return (tmp_path / "store").as_uri() if request.param == "file" else str(request.getfixturevalue("s3_uri"))


@pytest.fixture()
def store(store_uri: str) -> Store:
    return open_store(store_uri)


@pytest.fixture()
def file_store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "store").as_uri())


@pytest.fixture()
def s3_store(s3_uri: str) -> Store:
    return open_store(s3_uri)
