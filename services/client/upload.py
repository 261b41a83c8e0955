"""Files and folders into a revision: what the store has is not sent, and of a file that changed only what is new."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
from quartet.datasets.v1 import datasets_pb2

from services.client.retry import RETRIES, pause_s
from services.finetune.errors import DataLoss, Internal, InvalidArgument, NotFound, QuartetError, Unavailable
from services.finetune.store.delta import Signature, write_delta

if TYPE_CHECKING:
    from services.client.client import Client, Progress

DELTA_FROM_BYTES = 1 << 20
"""Smaller files are sent whole: a signature and a delta cost two rpcs more."""
WORTH = 0.7
"""A delta that is longer than this part of the file is not sent."""
IN_FLIGHT = 4
CHUNK_BYTES = 1 << 20


def files_of(paths: Sequence[Path]) -> list[tuple[str, Path]]:
    """(path in the revision, path here) of files, and of what folders hold but for hidden files.

    A folder alone gives its content; beside others each keeps its name. NotFound (FILE_NOT_FOUND), InvalidArgument
    (PATH_UNSAFE).
    """
    found: list[tuple[str, Path]] = []
    for path in paths:
        if path.is_file():
            found.append((path.name, path))
        elif path.is_dir():
            prefix = "" if len(paths) == 1 else f"{path.resolve().name}/"
            inside = [(prefix + name, path / name) for name in sorted(_below(path))]
            if not inside:
                raise NotFound(f"{path} is an empty folder", reason="FILE_NOT_FOUND")
            found += inside
        else:
            raise NotFound(f"{path} is no file or folder", reason="FILE_NOT_FOUND")
    names = [name for name, _ in found]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidArgument(
            f"two files are called {twice}; a dataset's files are told apart by their names", reason="PATH_UNSAFE"
        )
    return found


def _below(folder: Path) -> Iterator[str]:
    """The relative paths of a folder's plain files; links to folders are not followed."""
    for at, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and os.path.isfile(os.path.join(at, name)):
                yield Path(at, name).relative_to(folder).as_posix()


def upload_all(
    client: Client, dataset: str, files: Sequence[tuple[str, Path]], told: Progress
) -> list[datasets_pb2.RevisionFile]:
    """Bring all files to the store, a few at a time."""
    total = sum(path.stat().st_size for _, path in files)
    base = _latest(client, dataset) if any(p.stat().st_size >= DELTA_FROM_BYTES for _, p in files) else {}
    done: dict[str, int] = {}
    lock = threading.Lock()

    def send(entry: tuple[str, Path]) -> datasets_pb2.RevisionFile:
        name, path = entry

        def count(at: int, _: int) -> None:
            with lock:
                done[name] = at
                told(sum(done.values()), total)

        digest = _upload(client, dataset, path, base.get(name), count)
        count(path.stat().st_size, total)
        return datasets_pb2.RevisionFile(path=name, digest=digest)

    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        try:
            return list(pool.map(send, files))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _latest(client: Client, dataset: str) -> Mapping[str, tuple[str, str, str]]:
    """(revision, path, digest) of each file of the newest revision, by path; nothing if there is none."""
    try:
        name = f"{dataset}/revisions/latest"
        found = client.datasets.GetRevision(datasets_pb2.GetRevisionRequest(name=name))
    except QuartetError as error:
        if error.reason != "REVISION_NOT_FOUND":
            raise
        return {}
    return {f.path: (found.name, f.path, f.digest) for f in found.files}


def _upload(client: Client, dataset: str, path: Path, base: tuple[str, str, str] | None, told: Progress) -> str:
    with path.open("rb") as source:
        digest = "sha256:" + hashlib.file_digest(source, "sha256").hexdigest()
        size = source.tell()
    changed = base is not None and base[2] != digest and size >= DELTA_FROM_BYTES
    if base is not None and changed and _untouched(client, dataset, digest, size):
        # Whatever a delta meets, the whole file can still be sent.
        try:
            if _send_delta(client, dataset, path, base, (digest, size), told):
                return digest
        except QuartetError as error:
            if error.code not in ("INVALID_ARGUMENT", "UNIMPLEMENTED", "NOT_FOUND"):
                raise
    return client.upload_file(dataset, path, told, digest)


def _untouched(client: Client, dataset: str, digest: str, size: int) -> bool:
    """Whether neither the file nor a part of it is there yet."""
    try:
        upload = f"{dataset}/uploads/{digest.removeprefix('sha256:')}-{size}"
        client.datasets.GetBlobStatus(datasets_pb2.GetBlobStatusRequest(upload=upload))
    except NotFound:
        return True
    return False


def _send_delta(
    client: Client, dataset: str, path: Path, base: tuple[str, str, str], new: tuple[str, int], told: Progress
) -> bool:
    """Send a file as its difference to `base`; False, and nothing sent, if that would save little."""
    revision, old, _ = base
    request = datasets_pb2.GetFileSignatureRequest(name=revision, path=old)
    found = client.datasets.GetFileSignature(request)
    with tempfile.TemporaryDirectory() as folder:
        change = Path(folder) / "delta"
        with path.open("rb") as source, change.open("wb") as out:
            write_delta(Signature(found.chunk_bytes, found.chunks), source, out)
        if change.stat().st_size > WORTH * new[1]:
            return False
        delta = client.upload_file(dataset, change, told)
    status = client.datasets.ComposeBlob(
        datasets_pb2.ComposeBlobRequest(
            parent=dataset, digest=new[0], size_bytes=new[1], base_revision=revision, base_path=old, delta=delta
        )
    )
    return bool(status.complete)


def send_file(client: Client, dataset: str, path: Path, told: Progress, digest: str = "") -> str:
    """Client.upload_file."""
    if not digest:
        with path.open("rb") as source:
            digest = "sha256:" + hashlib.file_digest(source, "sha256").hexdigest()
    size = path.stat().st_size
    request = datasets_pb2.BeginUploadRequest(parent=dataset, digest=digest, size_bytes=size, direct=True)
    status = _send_direct(client, path, request, told)
    tries, reached = 0, status.committed_bytes
    while not status.complete:
        try:
            status = client.datasets.WriteBlob(_chunks(path, status, told))
            if not status.complete:
                raise Internal(f"the upload of {path} never completed", reason="UPLOAD_STUCK")
        except (Unavailable, DataLoss):
            if tries == RETRIES:
                raise
            time.sleep(pause_s(tries))
            status = _upload_status(client, status.upload, request)
            # Whoever gets on may go on: only cuts in one place are counted.
            tries = tries + 1 if status.committed_bytes <= reached else 0
            reached = status.committed_bytes
    told(size, size)
    return digest


def _send_direct(client: Client, path: Path, request: datasets_pb2.BeginUploadRequest, told: Progress) -> Any:
    """Announce a file, and send it to the store itself as far as that goes; the status then."""
    status = client.datasets.BeginUpload(request)
    while status.links:
        from services.client.direct import put_ranges

        before, whole = status.committed_bytes, put_ranges(path, status, told)
        status = client.datasets.BeginUpload(request)
        if not whole or status.committed_bytes <= before:
            break
    return status


def _upload_status(client: Client, upload: str, request: datasets_pb2.BeginUploadRequest) -> datasets_pb2.BlobStatus:
    status: datasets_pb2.BlobStatus
    try:
        status = client.datasets.GetBlobStatus(datasets_pb2.GetBlobStatusRequest(upload=upload))
    except QuartetError as error:
        # A finished upload may be forgotten while its answer was lost: announcing again finds the blob.
        if error.reason != "UPLOAD_NOT_FOUND":
            raise
        status = client.datasets.BeginUpload(request)
    return status


def _chunks(path: Path, status: Any, told: Progress) -> Iterator[datasets_pb2.WriteBlobRequest]:
    with path.open("rb") as source:
        at = source.seek(status.committed_bytes)
        while True:
            data = source.read(CHUNK_BYTES)
            # Also where all bytes are there and only their end is to be said.
            last = at + len(data) >= status.size_bytes or not data
            crc = google_crc32c.value(data)
            yield datasets_pb2.WriteBlobRequest(
                upload=status.upload, offset_bytes=at, data=data, crc32c=crc, finish=last
            )
            at += len(data)
            told(at, status.size_bytes)
            if last:
                return
