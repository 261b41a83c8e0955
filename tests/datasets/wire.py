"""What the tests of this room share: uploading, and reading errors as the client does."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator

import google_crc32c
from quartet.datasets.v1 import datasets_pb2 as pb
from quartet.datasets.v1.datasets_pb2_grpc import DatasetsStub

MIB = 1 << 20


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def new(datasets: DatasetsStub) -> str:
    """A fresh dataset's name."""
    wanted = pb.CreateDatasetRequest(parent="workspaces/default", dataset_id="d" + uuid.uuid4().hex[:12])
    return datasets.CreateDataset(wanted).name


def chunks(
    upload: str, data: bytes, start: int = 0, finish: bool = True, step: int = MIB
) -> Iterator[pb.WriteBlobRequest]:
    for at in range(start, max(len(data), 1), step):
        piece = data[at : at + step]
        last = finish and at + step >= len(data)
        crc = google_crc32c.value(piece)
        yield pb.WriteBlobRequest(upload=upload, offset_bytes=at, data=piece, crc32c=crc, finish=last)


def begin(datasets: DatasetsStub, parent: str, data: bytes) -> pb.BlobStatus:
    return datasets.BeginUpload(pb.BeginUploadRequest(parent=parent, digest=sha256(data), size_bytes=len(data)))


def upload(datasets: DatasetsStub, parent: str, data: bytes) -> str:
    """The digest of `data`, stored."""
    begun = begin(datasets, parent, data)
    if not begun.complete:
        assert datasets.WriteBlob(chunks(begun.upload, data)).complete
    return sha256(data)


def row(question: str = "hi", answer: str = "Hello.") -> bytes:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}).encode() + b"\n"


def commit(datasets: DatasetsStub, parent: str, files: dict[str, bytes], **given: object) -> pb.Revision:
    listed = [pb.RevisionFile(path=path, digest=upload(datasets, parent, data)) for path, data in files.items()]
    return datasets.CommitRevision(pb.CommitRevisionRequest(parent=parent, files=listed, **given))  # type: ignore[arg-type]
