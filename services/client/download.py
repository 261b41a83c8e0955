"""A model's or a job's files onto this machine: checked, and going on where a cut download stopped."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
from quartet.conversion.v1 import conversion_pb2
from quartet.training.v1 import training_pb2

from services.client.client import Client, Progress
from services.client.retry import RETRIES, pause_s
from services.client.show import plain
from services.finetune.errors import DataLoss, QuartetError, Unavailable
from services.finetune.store.artifacts import check_path

MANIFEST = "quartet_manifest.json"
Pieces = Callable[[Any, int], Iterator[Any]]
"""The bytes of a file from an offset on, as (data, crc32c)."""


def download_model(client: Client, model: Any, folder: Path, told: Progress = lambda done, total: None) -> None:
    """Fetch what is not there yet, verify every digest, and write the manifest last.

    InvalidArgument (PATH_UNSAFE), DataLoss (CHUNK_CORRUPT, BLOB_CORRUPT).
    """

    def pieces(file: Any, offset: int) -> Iterator[Any]:
        request = conversion_pb2.DownloadModelRequest(name=model.name, path=file.path, offset_bytes=offset)
        return iter(client.conversion.DownloadModel(request))

    _download(model.files, folder, pieces, told)
    manifest = json.dumps(plain(model), indent=1, ensure_ascii=False, sort_keys=True)
    (folder / MANIFEST).write_text(manifest, "utf-8")


def download_job_files(client: Client, job: str, files: Sequence[Any], folder: Path, told: Progress) -> None:
    """Fetch the files that a training job listed, as download_model. Aborted (FILE_CHANGED) if it replaced them since."""

    def pieces(file: Any, offset: int) -> Iterator[Any]:
        what = {"name": job, "path": file.path, "digest": file.digest}
        request = training_pb2.DownloadTrainingFileRequest(**what, offset_bytes=offset)
        return iter(client.training.DownloadTrainingFile(request))

    _download(files, folder, pieces, told)


def _download(files: Sequence[Any], folder: Path, pieces: Pieces, told: Progress) -> None:
    # The folder is ours, the names come from elsewhere.
    for file in files:
        check_path(file.path)
    done, total = 0, sum(file.size_bytes for file in files)
    for file in files:
        path = folder / file.path
        if not (path.is_file() and _digest(path) == file.digest):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Named by content, so that a part of another file is never gone on with.
            part = path.with_name(f"{path.name}.{file.digest[-12:]}.part")
            _fetch(file, part, pieces, lambda at, before=done: told(before + at, total))
            part.replace(path)
        done += file.size_bytes
        told(done, total)


def _fetch(file: Any, part: Path, pieces: Pieces, told: Any) -> None:
    for attempt in range(RETRIES + 1):
        try:
            _append(file, part, pieces, told)
            break
        except (Unavailable, DataLoss) as error:
            if attempt == RETRIES or not _passing(error):
                raise
            time.sleep(pause_s(attempt))
    if _digest(part) != file.digest:
        part.unlink()
        raise DataLoss(f"{file.path} does not have its digest; try again", reason="BLOB_CORRUPT")


def _append(file: Any, part: Path, pieces: Pieces, told: Any) -> None:
    with part.open("ab") as sink:
        if sink.tell() >= file.size_bytes:
            return
        for piece in pieces(file, sink.tell()):
            if google_crc32c.value(piece.data) != piece.crc32c:
                raise DataLoss(f"{file.path} was damaged on its way; try again", reason="CHUNK_CORRUPT")
            sink.write(piece.data)
            told(sink.tell())


def _passing(error: QuartetError) -> bool:
    return isinstance(error, Unavailable) or error.reason == "CHUNK_CORRUPT"


def _digest(path: Path) -> str:
    with path.open("rb") as source:
        return "sha256:" + hashlib.file_digest(source, "sha256").hexdigest()
