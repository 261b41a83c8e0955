"""What a config names on this machine, brought to the services: the base model's folder, the files of its rows."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quartet.conversion.v1 import conversion_pb2

from services.client.client import Client, Progress
from services.client.commands import short_name
from services.client.commands.models import import_name, start_import
from services.common.status import from_status
from services.finetune.config import DataSource, RunConfig
from services.finetune.errors import Cancelled, InvalidArgument, NotFound, QuartetError
from services.finetune.formats import Problem, Reading
from services.finetune.formats.carried import images
from services.finetune.formats.containers import raw_rows

Say = Callable[[str], None]
Rows = tuple[DataSource, list[Path]]

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
# Words in file names by which Hugging Face's load_dataset tells splits apart.
_SPLITS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}


def local_base(config: RunConfig) -> Path | None:
    """The folder or file of this machine that the config names as its base; None for a hub id, which the service knows.

    NotFound (FILE_NOT_FOUND).
    """
    checkpoint = config.model.checkpoint
    path = Path(checkpoint).expanduser()
    if checkpoint and path.exists():
        return path
    if checkpoint.startswith((".", "/", "~")):
        raise NotFound(f"model.checkpoint: {checkpoint} is not here; give --base", reason="FILE_NOT_FOUND")
    return None


def local_rows(config: RunConfig) -> list[Rows]:
    """The files of this machine that the config names as its data.

    InvalidArgument (DATASET_MISSING) for rows of a hub, NotFound (FILE_NOT_FOUND).
    """
    if not config.data.sources:
        raise InvalidArgument("the config names no data; give --data", reason="DATASET_MISSING")
    return [(source, _files(source)) for source in config.data.sources]


def bring_base(client: Client, path: Path, say: Say, told: Progress) -> str:
    """The model made of a folder or file: it is imported once. Raises as the import fails."""
    # The name tells the content, so an import is found again, and a changed folder is another model.
    name = f"{import_name(str(path.resolve()))[:54].rstrip('-')}-{_fingerprint(path)[:8]}"
    try:
        return str(client.model(name).name)
    except QuartetError as error:
        if error.reason != "MODEL_NOT_FOUND":
            raise
    say(f"importing {path} as {name}")
    job = start_import(client, str(path), name, conversion_pb2.ImportTask(), told)
    return finished(client, job)


def bring_rows(client: Client, rows: Rows, say: Say, told: Progress) -> str:
    """The revision made of a source's files; the same files again are the same revision. Raises as the upload fails."""
    source, files = rows
    place = source.files[0] if source.files else source.hub_id
    name = short_name(Path(place).resolve().name.partition(".")[0]) or "data"
    say(f"uploading {place} as dataset {name}")
    return str(client.upload_dataset(name, files, Reading(source.format), told, images_of(source, files)).name)


def images_of(source: DataSource, files: Sequence[Path]) -> list[tuple[str, Path]]:
    """(path in a row, path here) of the images that rows name, as far as they are in the source's folder of images."""
    folder, found = Path(source.images).expanduser(), dict[str, Path]()
    for file in files if source.images else ():
        for raw in raw_rows(file.name, file):
            for _, name in () if isinstance(raw, Problem) else images(raw[1]):
                path = folder / name
                # A config may be a stranger's, see _files: nothing but images, nothing outside the folder.
                inside = path.resolve().is_relative_to(folder.resolve())
                if inside and path.suffix.lower() in IMAGES and path.is_file():
                    found[name.removeprefix("./")] = path
    return list(found.items())


def _files(source: DataSource) -> list[Path]:
    """The files of a source; a hub's id may be a folder here, as load_dataset takes it."""
    if not source.files and not Path(source.hub_id).is_dir():
        last = short_name(source.hub_id.rpartition("/")[2])
        kind = f" --format {source.format}" if source.format else ""
        raise InvalidArgument(
            f"the rows of {source.hub_id} are on a hub; fetch them, run `quartet dataset create {last} FILES{kind}`, and "
            f"give --data {last}",
            reason="DATASET_MISSING",
            metadata={"hub_id": source.hub_id},
        )
    found: list[Path] = []
    for name in source.files or (source.hub_id,):
        path = Path(name).expanduser()
        if not path.exists():
            raise NotFound(f"data.sources: {name} is not here; give --data", reason="FILE_NOT_FOUND")
        if path.is_file() and path.suffix.lower() not in ROWS:
            # A config may be a stranger's: it must not make us send any file that it names.
            raise InvalidArgument(
                f"data.sources: {name} is no file of rows; use {', '.join(ROWS)}", reason="FORMAT_UNDETECTED"
            )
        found += of_split(path / source.folder, source.split) if path.is_dir() else [path]
    return found


def of_split(folder: Path, split: str) -> list[Path]:
    """The files of rows in a folder that belong to a split: those whose names say so, else all that name no split.

    NotFound (FILE_NOT_FOUND).
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix.lower() in ROWS)
    marked = {p: s for p in files for s in _SPLITS if _says(p.relative_to(folder).as_posix(), s)}
    chosen = [p for p in files if marked.get(p) == split] or [p for p in files if p not in marked and split == "train"]
    if not chosen:
        raise NotFound(f"{folder} holds no rows of the split {split}: {', '.join(ROWS)}", reason="FILE_NOT_FOUND")
    return chosen


def _says(name: str, split: str) -> bool:
    return re.search(rf"(?<![a-z])(?:{_SPLITS[split]})(?![a-z])", name.lower()) is not None


def _fingerprint(path: Path) -> str:
    """A digest of a model's file or folder, by names and bytes."""
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as source:
            digest = hashlib.file_digest(source, "sha256").hexdigest()
        whole.update(f"{file.name}\0{digest}\n".encode())
    return whole.hexdigest()


def finished(client: Client, job: conversion_pb2.ConversionJob) -> str:
    """Wait for a conversion; the model's name, or its error."""
    for _ in client.watch(job.name):
        pass
    ended: Any = client.job(job.name)
    if ended.state == conversion_pb2.ConversionJob.FAILED:
        raise from_status(ended.error)
    if ended.state != conversion_pb2.ConversionJob.SUCCEEDED:
        raise Cancelled(f"{job.name} was cancelled", reason="JOB_CANCELLED")
    return job.target_model
