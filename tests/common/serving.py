"""One room served in this process, on a unix socket, as the service itself does it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest

from services.common import names
from services.common.server import Room, Server
from services.common.settings import Settings
from services.common.status import CHANNEL_OPTIONS, from_rpc_error
from services.finetune.errors import QuartetError
from services.finetune.store import Store
from services.finetune.store.artifacts import Parent, put_ref
from tests.common.worker import tiny_artifact

W = "workspaces/default"


@contextlib.contextmanager
def serve(room: Room, home: Path) -> Iterator[grpc.Channel]:
    """A channel to the room's server."""
    settings = Settings(host=f"unix:{home}/s", home=str(home))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = Server(settings, [room])
    asyncio.run_coroutine_threadsafe(server.open(), loop).result(20)
    channel = grpc.insecure_channel(settings.host, options=CHANNEL_OPTIONS)
    try:
        yield channel
    finally:
        channel.close()
        asyncio.run_coroutine_threadsafe(server.close(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextlib.contextmanager
def refused(cls: type[QuartetError], reason: str) -> Iterator[list[QuartetError]]:
    """The block fails with this error; it is in the list afterwards."""
    found: list[QuartetError] = []
    with pytest.raises(grpc.RpcError) as caught:
        yield found
    found.append(from_rpc_error(caught.value))
    assert (type(found[0]), found[0].reason) == (cls, reason), found[0].to_json()


def fresh(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex[:8]}"


def put_model(
    store: Store, name: str, kind: str = "base", parents: tuple[Parent, ...] = (), template: str = "tokenizer"
) -> str:
    """Register a small model; its digest."""
    digest = tiny_artifact(store, kind, name, parents, template)
    body = {"digest": digest, "kind": kind, "display_name": "", "labels": {"of": kind}, "create_time": names.now()}
    put_ref(store, f"{W}/models/{name}", {**body, "job": ""})
    return digest


def put_dataset(store: Store, name: str) -> str:
    """Register a dataset of one revision, r1; the revision's name."""
    revision: Mapping[str, Any] = {"digest": "sha256:" + "d" * 64, "create_time": names.now(), "format": "messages"}
    full = f"{W}/datasets/{name}"
    put_ref(store, f"{full}/revisions/r1", revision)
    put_ref(store, full, {"display_name": "", "labels": {}, "latest_revision": f"{full}/revisions/r1"})
    return f"{full}/revisions/r1"
