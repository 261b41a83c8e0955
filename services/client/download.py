"""A model's files onto this machine: checked, and going on where a cut download stopped."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import google_crc32c
from quartet.conversion.v1 import conversion_pb2

from services.client.client import Client, Progress
from services.client.retry import RETRIES, pause_s
from services.client.show import plain
from services.finetune.errors import DataLoss, QuartetError, Unavailable
from services.finetune.store.artifacts import check_path

MANIFEST = "quartet_manifest.json"


def download_model(client: Client, model: Any, folder: Path, told: Progress = lambda done, total: None) -> None:
    """Fetch what is not there yet, verify every digest, and write the manifest last.

    InvalidArgument (PATH_UNSAFE), DataLoss (CHUNK_CORRUPT, BLOB_CORRUPT).
    """
    # The folder is ours, the names come from elsewhere.
    for file in model.files:
        check_path(file.path)
    done = 0
    for file in model.files:
        path = folder / file.path
        if not (path.is_file() and _digest(path) == file.digest):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Named by content, so that a part of another model's file is never gone on with.
            part = path.with_name(f"{path.name}.{file.digest[-12:]}.part")
            _fetch(client, model.name, file, part, lambda at, before=done: told(before + at, model.size_bytes))
            part.replace(path)
        done += file.size_bytes
        told(done, model.size_bytes)
    manifest = json.dumps(plain(model), indent=1, ensure_ascii=False, sort_keys=True)
    (folder / MANIFEST).write_text(manifest, "utf-8")


def _fetch(client: Client, model: str, file: Any, part: Path, told: Any) -> None:
    for attempt in range(RETRIES + 1):
        try:
            _append(client, model, file, part, told)
            break
        except (Unavailable, DataLoss) as error:
            if attempt == RETRIES or not _passing(error):
                raise
            time.sleep(pause_s(attempt))
    if _digest(part) != file.digest:
        part.unlink()
        raise DataLoss(f"{file.path} does not have its digest; try again", reason="BLOB_CORRUPT")


def _append(client: Client, model: str, file: Any, part: Path, told: Any) -> None:
    with part.open("ab") as sink:
        if sink.tell() >= file.size_bytes:
            return
        request = conversion_pb2.DownloadModelRequest(name=model, path=file.path, offset_bytes=sink.tell())
        for piece in client.conversion.DownloadModel(request):
            if google_crc32c.value(piece.data) != piece.crc32c:
                raise DataLoss(f"{file.path} was damaged on its way; try again", reason="CHUNK_CORRUPT")
            sink.write(piece.data)
            told(sink.tell())


def _passing(error: QuartetError) -> bool:
    return isinstance(error, Unavailable) or error.reason == "CHUNK_CORRUPT"


def _digest(path: Path) -> str:
    with path.open("rb") as source:
        return "sha256:" + hashlib.file_digest(source, "sha256").hexdigest()
