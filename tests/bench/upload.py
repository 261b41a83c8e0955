"""Upload through WriteBlob beside a bare grpc.aio stream that drops what it gets."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from quartet.datasets.v1 import datasets_pb2 as pb
from quartet.datasets.v1.datasets_pb2_grpc import DatasetsStub

from tests.e2e.stack import Stack

MIB = 1 << 20
SIZE = 256 * MIB


async def serve_bare() -> None:
    """A server whose one method counts bytes."""

    async def sink(messages, context):  # type: ignore[no-untyped-def]
        size = 0
        async for message in messages:
            size += len(message)
        return str(size).encode()

    server = grpc.aio.server()
    handlers: dict[str, Any] = {"Sink": grpc.stream_unary_rpc_method_handler(sink)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


def bench_upload(rounds: int = 5) -> tuple[list[float], list[float]]:
    """MB/s of `rounds` uploads of 256 MiB of fresh random bytes, ours and bare, in turn."""
    peer = subprocess.Popen([sys.executable, "-m", "tests.bench.upload"], stdout=subprocess.PIPE, text=True)
    assert peer.stdout is not None
    bare: Any = grpc.insecure_channel(f"127.0.0.1:{peer.stdout.readline().strip()}").stream_unary("/bare/Sink")
    with tempfile.TemporaryDirectory() as home:
        stack = Stack(Path(home)).start()
        datasets = DatasetsStub(grpc.insecure_channel(stack.address))
        parent = datasets.CreateDataset(pb.CreateDatasetRequest(parent="workspaces/default", dataset_id="b")).name
        ours_mb, bare_mb = [], []
        for _ in range(rounds):
            data = os.urandom(SIZE)
            pieces = [data[at : at + MIB] for at in range(0, SIZE, MIB)]
            began = time.monotonic()
            assert int(bare(iter(pieces))) == SIZE
            bare_mb.append(SIZE / 1e6 / (time.monotonic() - began))
            ours_mb.append(SIZE / 1e6 / upload(datasets, parent, data, pieces))
        stack.stop()
    peer.terminate()
    peer.wait()
    return ours_mb, bare_mb


def upload(datasets: DatasetsStub, parent: str, data: bytes, pieces: list[bytes]) -> float:
    """Seconds from the first chunk to the verified blob; the client's own sha256 is not counted."""
    import google_crc32c

    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    begun = datasets.BeginUpload(pb.BeginUploadRequest(parent=parent, digest=digest, size_bytes=len(data)))

    def chunks() -> Iterator[pb.WriteBlobRequest]:
        for n, piece in enumerate(pieces):
            crc, last = google_crc32c.value(piece), n == len(pieces) - 1
            yield pb.WriteBlobRequest(upload=begun.upload, offset_bytes=n * MIB, data=piece, crc32c=crc, finish=last)

    began = time.monotonic()
    assert datasets.WriteBlob(chunks()).complete
    return time.monotonic() - began


if __name__ == "__main__":
    asyncio.run(serve_bare())
