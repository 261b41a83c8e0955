"""Ranges of a file sent to the store itself, by links that the service signed."""

from __future__ import annotations

import http.client
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from services.client.client import Progress

IN_FLIGHT = 4
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
    for _ in range(tries):
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
    return False
