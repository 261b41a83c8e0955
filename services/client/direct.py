"""Ranges of a file sent to the store itself or fetched from it, by links that the service signed."""

from __future__ import annotations

import http.client
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from services.client.client import Progress

IN_FLIGHT = 4
RANGE_BYTES = 8 << 20
TRIES = 3
TIMEOUT_S = 60.0
FIRST_TIMEOUT_S = 5.0


def put_ranges(path: Path, status: Any, told: Progress) -> bool:
    """PUT each range that a BlobStatus links; whether all arrived. If not, the service takes the rest: it says how far the
    upload has come, and the store may be out of this machine's reach."""
    lock, done = threading.Lock(), [status.committed_bytes]

    def put(link: Any) -> bool:
        if not _put(path, link, TIMEOUT_S):
            return False
        with lock:
            done[0] += link.size_bytes
            told(done[0], status.size_bytes)
        return True

    first, *rest = status.links
    # One alone and soon given up: where there is no way to the store, nothing more waits for it.
    if not _put(path, first, FIRST_TIMEOUT_S, tries=1):
        return False
    done[0] += first.size_bytes
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        try:
            return all(list(pool.map(put, rest)))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _put(path: Path, link: Any, timeout_s: float, tries: int = TRIES) -> bool:
    with path.open("rb") as source:
        source.seek(link.offset_bytes)
        data = source.read(link.size_bytes)
    if not link.url.startswith(("http://", "https://")):
        return False
    request = urllib.request.Request(
        link.url, data=data, method="PUT", headers={"Content-Type": "application/octet-stream"}
    )
    return _answered(request, 200, timeout_s, tries) is not None


def get_ranges(url: str, offset: int, size: int) -> Iterator[bytes]:
    """A file of `size` bytes from `offset` on, in order, a few ranges on their way at once. It ends early where the store
    is out of reach or says no: the service gives the rest."""
    if not url.startswith(("http://", "https://")):
        return
    starts, flying = iter(range(offset, size, RANGE_BYTES)), deque[Future[bytes | None]]()
    # As in put_ranges: the first one is alone.
    if (data := _get(url, next(starts, size), size, FIRST_TIMEOUT_S, tries=1)) is None:
        return
    yield data
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        try:
            flying.extend(pool.submit(_get, url, at, size, TIMEOUT_S) for at in islice(starts, IN_FLIGHT))
            while flying and (data := flying.popleft().result()) is not None:
                yield data
                flying.extend(pool.submit(_get, url, at, size, TIMEOUT_S) for at in islice(starts, 1))
        finally:
            pool.shutdown(cancel_futures=True)


def _get(url: str, start: int, size: int, timeout_s: float, tries: int = TRIES) -> bytes | None:
    """One range, or None."""
    stop = min(start + RANGE_BYTES, size)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-{stop - 1}"})
    data = _answered(request, 206, timeout_s, tries)
    return data if data is not None and len(data) == stop - start else None


def _answered(request: urllib.request.Request, status: int, timeout_s: float, tries: int) -> bytes | None:
    """The body of an answer with this status, or None."""
    for _ in range(tries):
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return bytes(answer.read()) if answer.status == status else None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
    return None
