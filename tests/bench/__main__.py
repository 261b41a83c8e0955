"""`make bench`: each section measures against its named peer, interleaved in one run, and prints ratio and spread."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.bench.consolidate import bench_consolidate
from tests.bench.second import bench_second
from tests.bench.upload import bench_edit, bench_memory, bench_upload
from tests.e2e.stack import Stack


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} (min {min(values):.2f}, max {max(values):.2f}, n {len(values)})"


def rss_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")


def bench_start(rounds: int = 5) -> None:
    """Start of all four services in one process, until they answer; goal 3 s and 150 MB."""
    seconds, sizes = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as home:
            began = time.monotonic()
            stack = Stack(Path(home)).start()
            seconds.append(time.monotonic() - began)
            assert stack.process is not None
            sizes.append(rss_mb(stack.process.pid))
            stack.stop()
    print(f"start  seconds {spread(seconds)}  goal 3")
    print(f"start  RSS MB  {spread(sizes)}  goal 150")


def bench_uploads() -> None:
    """Goals: 0.8 of the bare stream; the service grows by 128 MiB at most; 1 % of rows is about 1 % of bytes."""
    ours, bare, disk = bench_upload()
    ratio = [a / b for a, b in zip(ours, bare, strict=True)]
    print(f"upload MB/s    {spread(ours)}")
    print(f"upload peer    {spread(bare)}  a bare grpc.aio client stream of 1 MiB messages, bytes dropped")
    print(f"upload disk    {spread(disk)}  the same bytes written to a file and synced, by no one else")
    print(f"upload ratio   {spread(ratio)}  goal 0.8")
    grown, speed = bench_memory()
    print(f"upload RSS     grows {grown:.0f} MiB during 5 GB at {speed:.0f} MB/s  goal 128")
    for kind, (sent, read) in bench_edit().items():
        print(f"upload edit    1 % of rows, {kind}: {sent:.2f} % of 100 MB goes up, {read:.2f} % comes down")


def bench_preparing() -> None:
    first, second = bench_second()
    print(f"prepare s      {spread(first)}  20,000 short rows, from the request to SUCCEEDED")
    print(f"the same again {spread(second)}  from another workspace; goal 2")


def bench_zero3() -> None:
    """ZeRO-3 to safetensors; goals 0.5 of the peer's time, 0.1 of its memory."""
    if not (peer := os.environ.get("QUARTET_BENCH_DEEPSPEED")):
        print("zero3  left out: QUARTET_BENCH_DEEPSPEED names no python that has DeepSpeed")
        return
    found = bench_consolidate(peer)
    print(f"zero3  GB      {found['bytes'][0] / 1e9:.2f} of float32 numbers from 8 ranks")
    for unit, goal in {"seconds": 0.5, "MB": 0.1}.items():
        mine, theirs = found[unit], found[f"peer {unit}"]
        ratio = [a / b for a, b in zip(mine, theirs, strict=True)]
        print(f"zero3  {unit:7} {spread(mine)}; DeepSpeed's zero_to_fp32 {spread(theirs)}")
        print(f"zero3  ratio   {spread(ratio)}  goal {goal}")


def main(sections: Sequence[str]) -> None:
    known = {"start": bench_start, "upload": bench_uploads, "prepare": bench_preparing, "zero3": bench_zero3}
    for name in sections or known:
        known[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
