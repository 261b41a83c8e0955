"""Calls that outlive a service's short absence: safe retries, our error classes, TLS."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import grpc

from services.common import auth
from services.common.status import STATUS_METADATA, from_rpc_error
from services.finetune.errors import InvalidArgument, QuartetError, Unavailable

T = TypeVar("T")

RETRIES = 4
AWAY_S = 60.0
"""A service that has answered before is waited for so long: it is being replaced, or its store or database is."""
_NOBODY = ("connection refused", "no such file or directory")
"""How gRPC words an address, or a unix socket, where nobody listens."""


class Room:
    """A stub whose calls show the token, are tried again while that is safe, and raise our errors."""

    def __init__(self, stub: Any, metadata: auth.Metadata, address: str) -> None:
        self._stub = stub
        self._metadata = (*metadata, *STATUS_METADATA)
        self._address = address
        self._met = False

    def __getattr__(self, rpc: str) -> Callable[..., Any]:
        call = getattr(self._stub, rpc)
        if rpc.startswith("Watch") or rpc in ("DownloadModel", "CollectGarbage", "ImportFiles", "Generate", "Chat"):
            return lambda request: self._stream(call, request)
        retries = 0 if rpc == "WriteBlob" else RETRIES
        return lambda request: self._single(call, request, retries)

    def _single(self, call: Callable[..., T], request: Any, retries: int) -> T:
        asked = time.monotonic()
        for attempt in itertools.count():
            try:
                answer = call(request, metadata=self._metadata)
                self._met = True
                return answer
            except grpc.RpcError as raised:
                self._raise_unless_again(raised, attempt, retries, asked)
        raise AssertionError("the loop returns or raises")

    def _stream(self, call: Callable[..., Any], request: Any) -> Iterator[Any]:
        """Tried again until the first answer came; what then breaks off is its caller's to go on with."""
        asked = time.monotonic()
        for attempt in itertools.count():
            begun = False
            try:
                for answer in call(request, metadata=self._metadata):
                    begun = self._met = True
                    yield answer
                return
            except grpc.RpcError as raised:
                if begun:
                    raise self._explain(raised) from raised
                self._raise_unless_again(raised, attempt, RETRIES, asked)

    def _raise_unless_again(self, raised: grpc.RpcError, attempt: int, retries: int, asked: float) -> None:
        """Wait before the next try, or raise our error where another is of no use."""
        error = self._explain(raised)
        if not isinstance(error, Unavailable):
            self._met = True  # a refusal is an answer too
            raise error from raised
        # Nobody listens: waiting would not help a person who forgot to start the server.
        hopeless = attempt >= retries or error.reason == "NOBODY_LISTENS"
        patient = retries > 0 and self._met and time.monotonic() - asked < AWAY_S
        if hopeless and not patient:
            raise error from raised
        time.sleep(pause_s(attempt))

    def _explain(self, raised: grpc.RpcError) -> QuartetError:
        error = from_rpc_error(raised)
        if error.reason == "UNREACHABLE" and any(sign in error.message.lower() for sign in _NOBODY):
            return Unavailable(
                f"no Quartet at {self._address}; start one with `quartet up`, or set QUARTET_ENDPOINT",
                reason="NOBODY_LISTENS",
            )
        return error


def credentials(ca: str, cert: str, key: str) -> grpc.ChannelCredentials | None:
    """TLS if any of its files is named, here or by QUARTET_TLS_*; without `ca` the system's roots are trusted."""
    ca = ca or os.environ.get("QUARTET_TLS_CA", "")
    cert, key = cert or os.environ.get("QUARTET_TLS_CERT", ""), key or os.environ.get("QUARTET_TLS_KEY", "")
    if not (ca or cert or key):
        return None
    if bool(cert) != bool(key):
        raise InvalidArgument("--tls-cert and --tls-key go together", reason="TLS_FILES_INVALID")
    try:
        roots, chain, secret = (Path(name).read_bytes() if name else None for name in (ca, cert, key))
    except OSError as error:
        raise InvalidArgument(f"cannot read {error.filename}", reason="TLS_FILES_INVALID") from error
    return grpc.ssl_channel_credentials(roots, secret, chain)


def pause_s(attempt: int) -> float:
    """Seconds to wait before try `attempt` + 1: doubling, with jitter so that many clients do not come back as one."""
    seconds: float = min(0.2 * 2**attempt, 3.0) * random.uniform(0.75, 1.25)
    return seconds


def pages(call: Callable[[Any], Any], request: Any, field: str) -> Iterator[Any]:
    """All items of a list rpc, page by page."""
    request.page_size = 1000
    while True:
        page = call(request)
        yield from getattr(page, field)
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token
