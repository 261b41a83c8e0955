"""Upload through WriteBlob beside a bare grpc.aio stream that drops what it gets; what a long one costs the service in
memory; and how much of an edited file travels again."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import grpc
from quartet.datasets.v1 import datasets_pb2 as pb
from quartet.datasets.v1.datasets_pb2_grpc import DatasetsStub

from services.client import Client
from tests.e2e.stack import Stack

MIB = 1 << 20
SIZE = 256 * MIB
LONG_SIZE = 5_000 * MIB
EDITED_BYTES = 100_000_000


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


def bench_upload(rounds: int = 5) -> tuple[list[float], list[float], list[float]]:
    """MB/s of `rounds` uploads of 256 MiB of fresh random bytes, in turn: ours, the bare stream, and the disk alone (one
    file written and synced): no upload that is durable can be faster than that."""
    peer = subprocess.Popen([sys.executable, "-m", "tests.bench.upload"], stdout=subprocess.PIPE, text=True)
    assert peer.stdout is not None
    bare: Any = grpc.insecure_channel(f"127.0.0.1:{peer.stdout.readline().strip()}").stream_unary("/bare/Sink")
    with tempfile.TemporaryDirectory() as folder:
        stack = Stack(Path(folder) / "home").start()
        datasets = DatasetsStub(grpc.insecure_channel(stack.address))
        parent = _dataset(datasets)
        ours_mb, bare_mb, disk_mb = [], [], []
        for _ in range(rounds):
            data = os.urandom(SIZE)
            pieces = [data[at : at + MIB] for at in range(0, SIZE, MIB)]
            began = time.monotonic()
            assert int(bare(iter(pieces))) == SIZE
            bare_mb.append(SIZE / 1e6 / (time.monotonic() - began))
            disk_mb.append(SIZE / 1e6 / _write(Path(folder) / "plain", pieces))
            ours_mb.append(SIZE / 1e6 / upload(datasets, parent, "sha256:" + hashlib.sha256(data).hexdigest(), pieces))
        stack.stop()
    peer.terminate()
    peer.wait()
    return ours_mb, bare_mb, disk_mb


def _write(path: Path, pieces: Sequence[bytes]) -> float:
    """Seconds to write and sync a file."""
    began = time.monotonic()
    with path.open("wb", buffering=0) as out:
        for piece in pieces:
            out.write(piece)
        os.fsync(out.fileno())
    seconds = time.monotonic() - began
    path.unlink()
    return seconds


def upload(datasets: DatasetsStub, parent: str, digest: str, pieces: Sequence[bytes]) -> float:
    """Seconds from the first chunk to the verified blob; the client's own sha256 is not counted."""
    size = sum(map(len, pieces))
    begun = datasets.BeginUpload(pb.BeginUploadRequest(parent=parent, digest=digest, size_bytes=size))

    def chunks() -> Iterator[pb.WriteBlobRequest]:
        for n, piece in enumerate(pieces):
            crc, last = google_crc32c.value(piece), n == len(pieces) - 1
            yield pb.WriteBlobRequest(upload=begun.upload, offset_bytes=n * MIB, data=piece, crc32c=crc, finish=last)

    began = time.monotonic()
    assert datasets.WriteBlob(chunks()).complete
    return time.monotonic() - began


def bench_memory(size: int = LONG_SIZE) -> tuple[float, float]:
    """(MiB that the service's RSS grows by at most, MB/s) during one upload of `size` bytes."""
    with tempfile.TemporaryDirectory() as folder:
        stack = Stack(Path(folder)).start()
        assert stack.process is not None
        datasets = DatasetsStub(grpc.insecure_channel(stack.address))
        parent = _dataset(datasets)
        warm = os.urandom(MIB)
        upload(datasets, parent, "sha256:" + hashlib.sha256(warm).hexdigest(), [warm])
        # One piece many times: neither side can tell, and this side's memory stays out of the way.
        pieces, sha = [os.urandom(MIB)] * (size // MIB), hashlib.sha256()
        for piece in pieces:
            sha.update(piece)
        before, seen, ended = _rss_mib(stack.process.pid), [0.0], threading.Event()

        def watch(pid: int) -> None:
            while not ended.wait(0.02):
                seen[0] = max(seen[0], _rss_mib(pid))

        watcher = threading.Thread(target=watch, args=(stack.process.pid,))
        watcher.start()
        seconds = upload(datasets, parent, "sha256:" + sha.hexdigest(), pieces)
        ended.set()
        watcher.join()
        stack.stop()
    return seen[0] - before, size / 1e6 / seconds


def bench_edit() -> dict[str, tuple[float, float]]:
    """By kind of edit, percent of a 100 MB file of rows that goes up, and that comes down to know what, for 1 % of rows."""
    found = {}
    for kind in ("contiguous", "scattered"):
        with tempfile.TemporaryDirectory() as folder:
            stack = Stack(Path(folder) / "home").start()
            path, dice = Path(folder) / "rows.jsonl", random.Random(1)
            words = [f"{dice.getrandbits(40):x}" for _ in range(5000)]
            lines = list(_rows(words, dice))
            path.write_text("".join(lines))
            with Client(stack.address) as client:
                client.upload_dataset("edited", [path])
                count = len(lines)
                start = count // 3
                where = (
                    range(start, start + count // 100)
                    if kind == "contiguous"
                    else dice.sample(range(count), count // 100)
                )
                for n in where:
                    lines[n] = lines[n].replace('"user", "content": "', '"user", "content": "Please: ', 1)
                path.write_text("".join(lines))
                found[kind] = _second_upload(client, path)
            stack.stop()
    return found


def _second_upload(client: Client, path: Path) -> tuple[float, float]:
    """(percent sent, percent read) of a file whose older state is the dataset's newest revision."""
    sent, read = [0], [0]
    write, sign = client.datasets.WriteBlob, client.datasets.GetFileSignature

    class Counting:
        def __getattr__(self, rpc: str) -> Any:
            return {"WriteBlob": self.write, "GetFileSignature": self.sign}.get(rpc) or getattr(plain, rpc)

        def write(self, requests: Iterator[Any]) -> Any:
            return write(self.counted(requests))

        def counted(self, requests: Iterator[Any]) -> Iterator[Any]:
            for request in requests:
                sent[0] += request.ByteSize()
                yield request

        def sign(self, request: Any) -> Any:
            answer = sign(request)
            read[0] += answer.ByteSize()
            return answer

    plain = client.datasets
    client.datasets = Counting()
    client.upload_dataset("edited", [path])
    size = path.stat().st_size
    return 100 * sent[0] / size, 100 * read[0] / size


def _rows(words: Sequence[str], dice: random.Random) -> Iterator[str]:
    """Chat rows of 300 to 2000 bytes, EDITED_BYTES of them."""
    left = EDITED_BYTES
    while left > 0:
        ask, say = (" ".join(dice.choices(words, k=dice.randint(10, 90))) for _ in range(2))
        turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]
        line = json.dumps({"messages": turns}) + "\n"
        left -= len(line)
        yield line


def _dataset(datasets: DatasetsStub) -> str:
    return datasets.CreateDataset(pb.CreateDatasetRequest(parent="workspaces/default", dataset_id="b")).name


def _rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")


if __name__ == "__main__":
    asyncio.run(serve_bare())
