"""The command line run in this process, against small real gRPC servers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from services.client.__main__ import main


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)


Quartet = Callable[..., Done]


@pytest.fixture()
def quartet(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Quartet:
    """Run the command line; QUARTET_* of whoever runs the tests are not seen."""
    for name in ("ENDPOINT", "TOKEN_FILE", "TLS_CA", "TLS_CERT", "TLS_KEY", "DATASETS_ENDPOINT", "TRAINING_ENDPOINT"):
        monkeypatch.delenv(f"QUARTET_{name}", raising=False)

    def run(*words: str) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main(words)
        told = capsys.readouterr()
        assert "Traceback" not in told.err
        return Done(int(left.value.code or 0), told.out, told.err)

    return run


@contextmanager
def serving(*add: Callable[[grpc.Server], None], address: str = "127.0.0.1:0") -> Iterator[str]:
    """A gRPC server of these servicers; its address."""
    server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.max_metadata_size", 1 << 21)])
    for servicer in add:
        servicer(server)
    port = server.add_insecure_port(address)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()
