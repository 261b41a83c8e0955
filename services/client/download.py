"""A model's or a job's files onto this machine: checked, and going on where a cut download stopped."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
from quartet.conversion.v1 import conversion_pb2
from quartet.training.v1 import training_pb2

from services.client import direct
from services.client.client import Client, Progress
from services.client.retry import RETRIES, pause_s
from services.client.show import plain
from services.finetune.errors import DataLoss, QuartetError, Unavailable
from services.finetune.store.artifacts import check_path

MANIFEST = "quartet_manifest.json"
IN_FLIGHT = 4
PIECE_BYTES = 1 << 20
Pieces = Callable[[Any, int], Iterator[bytes]]
"""The bytes of a file from an offset on."""


def download_model(client: Client, model: Any, folder: Path, told: Progress = lambda done, total: None) -> None:
    """Fetch what is not there yet, verify every digest, and write the manifest last. Large files come from the store itself
    where the service gives a link and the store answers.

    InvalidArgument (PATH_UNSAFE), DataLoss (CHUNK_CORRUPT, BLOB_CORRUPT).
    """

    reached = True

    def pieces(file: Any, offset: int) -> Iterator[bytes]:
        nonlocal reached
        request = conversion_pb2.DownloadModelRequest(
            name=model.name, path=file.path, offset_bytes=offset, direct=reached
        )
        answers = iter(client.conversion.DownloadModel(request))
        first = next(answers, None)
        if first is not None and first.url:
            for data in direct.get_ranges(first.url, offset, file.size_bytes):
                request.offset_bytes += len(data)
                yield data
            if request.offset_bytes == file.size_bytes:
                return
            reached = request.offset_bytes > offset  # else no other file waits for the store
            request.direct = False
            first, answers = None, iter(client.conversion.DownloadModel(request))
        yield from _checked(file, chain([first] if first is not None else [], answers))

    _download(model.files, folder, pieces, told)
    manifest = json.dumps(plain(model), indent=1, ensure_ascii=False, sort_keys=True)
    (folder / MANIFEST).write_text(manifest, "utf-8")


def download_job_files(client: Client, job: str, files: Sequence[Any], folder: Path, told: Progress) -> None:
    """Fetch the files that a training job listed, as download_model. Aborted (FILE_CHANGED) if it replaced them since."""

    def pieces(file: Any, offset: int) -> Iterator[bytes]:
        what = {"name": job, "path": file.path, "digest": file.digest}
        request = training_pb2.DownloadTrainingFileRequest(**what, offset_bytes=offset)
        return _checked(file, client.training.DownloadTrainingFile(request))

    _download(files, folder, pieces, told)


def _download(files: Sequence[Any], folder: Path, pieces: Pieces, told: Progress) -> None:
    """A few files at a time."""
    # The folder is ours, the names come from elsewhere.
    for file in files:
        check_path(file.path)
    lock, done, total = threading.Lock(), dict[str, int](), sum(file.size_bytes for file in files)

    def count(path: str, at: int) -> None:
        with lock:
            done[path] = at
            told(sum(done.values()), total)

    def fetch(file: Any) -> None:
        path = folder / file.path
        if not (path.is_file() and path.stat().st_size == file.size_bytes and _digest(path) == file.digest):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Named by content, so that a part of another file is never gone on with.
            part = path.with_name(f"{path.name}.{file.digest[-12:]}.part")
            _fetch(file, part, pieces, lambda at: count(file.path, at))
            part.replace(path)
        count(file.path, file.size_bytes)

    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        try:
            list(pool.map(fetch, files))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _fetch(file: Any, part: Path, pieces: Pieces, told: Callable[[int], None]) -> None:
    found = part.stat().st_size if part.is_file() else 0
    if found > file.size_bytes:
        part.unlink()
        found = 0
    if not _complete(file, part, pieces, told):
        part.unlink()
        # What an earlier download left may be what was wrong.
        if not found or not _complete(file, part, pieces, told):
            part.unlink(missing_ok=True)
            raise DataLoss(f"{file.path} does not have its digest; try again", reason="BLOB_CORRUPT")


def _complete(file: Any, part: Path, pieces: Pieces, told: Callable[[int], None]) -> bool:
    """Fetch what a part lacks, going on after cuts; whether it has its digest then."""
    with part.open("a+b") as sink:
        sha = hashlib.sha256()
        sink.seek(0)
        while data := sink.read(PIECE_BYTES):
            sha.update(data)
        tries, reached = 0, sink.tell()
        while True:
            try:
                _append(file, sink, sha, pieces, told)
                return bool("sha256:" + sha.hexdigest() == file.digest)
            except (Unavailable, DataLoss) as error:
                if tries == RETRIES or not _passing(error):
                    raise
                time.sleep(pause_s(tries))
                # Whoever gets on may go on: only cuts in one place are counted.
                tries, reached = (tries + 1 if sink.tell() <= reached else 0), sink.tell()


def _append(file: Any, sink: BinaryIO, sha: Any, pieces: Pieces, told: Callable[[int], None]) -> None:
    if sink.tell() >= file.size_bytes:
        return
    for data in pieces(file, sink.tell()):
        sink.write(data)
        sha.update(data)
        told(sink.tell())


def _checked(file: Any, answers: Iterable[Any]) -> Iterator[bytes]:
    for piece in answers:
        if google_crc32c.value(piece.data) != piece.crc32c:
            raise DataLoss(f"{file.path} was damaged on its way; try again", reason="CHUNK_CORRUPT")
        yield piece.data


def _passing(error: QuartetError) -> bool:
    return isinstance(error, Unavailable) or error.reason == "CHUNK_CORRUPT"


def _digest(path: Path) -> str:
    with path.open("rb") as source:
        return "sha256:" + hashlib.file_digest(source, "sha256").hexdigest()
