from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from quartet.datasets.v1 import datasets_pb2 as pb
from quartet.datasets.v1.datasets_pb2_grpc import DatasetsStub

from services.client import Client
from services.finetune.errors import DataLoss, InvalidArgument, NotFound, OutOfRange
from tests.common.serving import refused
from tests.datasets.conftest import Service
from tests.datasets.wire import MIB, begin, chunks, new, sha256, upload
from tests.seaweed import seaweed


def test_bytes_arrive_and_are_not_sent_twice(datasets: DatasetsStub) -> None:
    parent, data = new(datasets), os.urandom(5 * MIB + 7)
    upload(datasets, parent, data)
    again = begin(datasets, new(datasets), data)
    assert again.complete and again.committed_bytes == len(data)
    assert datasets.GetBlobStatus(pb.GetBlobStatusRequest(upload=again.upload)).complete


def test_an_empty_file(datasets: DatasetsStub) -> None:
    upload(datasets, new(datasets), b"")


def test_a_killed_server_goes_on_where_it_stopped(tmp_path: Path) -> None:
    service = Service(tmp_path).start()
    data = os.urandom(20 * MIB)
    parent = new(service.stub)
    begun = begin(service.stub, parent, data)
    status = pb.GetBlobStatusRequest(upload=begun.upload)
    hang = threading.Event()

    def slowly() -> Iterator[pb.WriteBlobRequest]:
        for chunk in chunks(begun.upload, data):
            if chunk.offset_bytes == 12 * MIB:
                hang.wait()
            yield chunk

    call = service.stub.WriteBlob.future(slowly())
    while service.stub.GetBlobStatus(status).committed_bytes < 11 * MIB:
        assert not call.done()
    service.kill()
    hang.set()
    with pytest.raises(grpc.RpcError):
        call.result()
    service.start()
    left = service.stub.GetBlobStatus(status)
    assert 11 * MIB <= left.committed_bytes < len(data) and not left.complete
    assert begin(service.stub, parent, data).committed_bytes == left.committed_bytes
    assert service.stub.WriteBlob(chunks(begun.upload, data, left.committed_bytes)).complete
    assert service.stop() == 0


def test_a_client_that_goes_away_leaves_whole_chunks(datasets: DatasetsStub) -> None:
    parent, data = new(datasets), os.urandom(4 * MIB)
    begun = begin(datasets, parent, data)
    cut = datasets.WriteBlob(chunks(begun.upload, data[: 2 * MIB], finish=False))
    assert not cut.complete and cut.committed_bytes == 2 * MIB
    assert datasets.WriteBlob(chunks(begun.upload, data, 2 * MIB)).complete


def test_a_wrong_digest_drops_it_all(datasets: DatasetsStub) -> None:
    parent, data = new(datasets), os.urandom(1000)
    lie = sha256(data + b"x")
    begun = datasets.BeginUpload(pb.BeginUploadRequest(parent=parent, digest=lie, size_bytes=1000))
    with refused(InvalidArgument, "DIGEST_MISMATCH"):
        datasets.WriteBlob(chunks(begun.upload, data))
    with refused(NotFound, "UPLOAD_NOT_FOUND"):
        datasets.GetBlobStatus(pb.GetBlobStatusRequest(upload=begun.upload))


def test_a_damaged_chunk_is_refused_and_can_be_sent_again(datasets: DatasetsStub) -> None:
    parent, data = new(datasets), os.urandom(3 * MIB)
    begun = begin(datasets, parent, data)
    sent = list(chunks(begun.upload, data))
    sent[1].data = b"\0" + sent[1].data[1:]
    with refused(DataLoss, "CHUNK_CORRUPT"):
        datasets.WriteBlob(iter(sent))
    status = datasets.GetBlobStatus(pb.GetBlobStatusRequest(upload=begun.upload))
    assert status.committed_bytes == MIB
    assert datasets.WriteBlob(chunks(begun.upload, data, MIB)).complete


def test_offsets_and_sizes_are_checked(datasets: DatasetsStub) -> None:
    parent, data = new(datasets), os.urandom(2 * MIB)
    begun = begin(datasets, parent, data)
    with refused(OutOfRange, "OFFSET_WRONG") as errors:
        datasets.WriteBlob(chunks(begun.upload, data, start=MIB))
    assert errors[0].metadata["offset_bytes"] == "0"
    with refused(InvalidArgument, "CHUNK_TOO_LARGE"):
        datasets.WriteBlob(chunks(begun.upload, data, step=MIB + 1))
    with refused(InvalidArgument, "SIZE_MISMATCH"):
        datasets.WriteBlob(chunks(begun.upload, data + b"x"))


def test_malformed_announcements(datasets: DatasetsStub) -> None:
    parent = new(datasets)
    for digest in ("", "md5:x", "sha256:" + "g" * 64, "sha256:../../etc"):
        with refused(InvalidArgument, "DIGEST_MALFORMED"):
            datasets.BeginUpload(pb.BeginUploadRequest(parent=parent, digest=digest, size_bytes=1))
    with refused(InvalidArgument, "SIZE_MISMATCH"):
        datasets.BeginUpload(pb.BeginUploadRequest(parent=parent, digest=sha256(b""), size_bytes=-1))
    with refused(NotFound, "DATASET_NOT_FOUND"):
        begin(datasets, "workspaces/default/datasets/nobody", b"x")
    with refused(NotFound, "UPLOAD_NOT_FOUND"):
        datasets.WriteBlob(chunks(f"{parent}/uploads/{'0' * 64}-1", b"x"))
    with refused(InvalidArgument, "NAME_MALFORMED"):
        datasets.WriteBlob(iter(()))
    begun, other = begin(datasets, parent, b"ab"), begin(datasets, parent, b"cd")
    mixed = [pb.WriteBlobRequest(upload=begun.upload), pb.WriteBlobRequest(upload=other.upload)]
    with refused(InvalidArgument, "NAME_MALFORMED"):
        datasets.WriteBlob(iter(mixed))


def test_large_files_may_go_to_the_store_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with seaweed() as (uri, credentials):
        for name, value in credentials.items():
            monkeypatch.setenv(name, value)
        service = Service(tmp_path, "--store-uri", uri).start()
        parent, small, large = new(service.stub), os.urandom(8 * MIB), os.urandom(17 * MIB)
        wanted = pb.BeginUploadRequest(parent=parent, digest=sha256(small), size_bytes=len(small), direct=True)
        assert not service.stub.BeginUpload(wanted).links
        assert not begin(service.stub, parent, large).links  # who does not ask gets none
        path = tmp_path / "large"
        path.write_bytes(large)
        with Client(service.address) as client:
            sent: list[int] = []
            write = client.datasets.WriteBlob

            def counted(requests: Iterator[pb.WriteBlobRequest]) -> Iterator[pb.WriteBlobRequest]:
                for request in requests:
                    sent.append(len(request.data))
                    yield request

            counting = property(lambda room: lambda requests: write(counted(requests)))
            monkeypatch.setattr("services.client.retry.Room.WriteBlob", counting, raising=False)
            told: list[tuple[int, int]] = []
            digest = client.upload_file(parent, path, lambda done, total: told.append((done, total)))
            assert digest == sha256(large) and sent == [0] and told[-1] == (len(large), len(large))
            # Where the store is out of reach the service takes it, from where it stands.
            path.write_bytes(large[::-1])
            monkeypatch.setattr("services.client.direct._put", lambda *args, **more: False)
            assert client.upload_file(parent, path) == sha256(large[::-1]) and sum(sent) == len(large)
        assert service.stop() == 0
        closed = Service(tmp_path, "--store-uri", uri, "--direct-uploads", "off").start()
        wanted = pb.BeginUploadRequest(parent=parent, digest=sha256(large[1:]), size_bytes=len(large) - 1, direct=True)
        assert not closed.stub.BeginUpload(wanted).links
        assert closed.stop() == 0


def test_an_upload_whose_last_word_was_lost_is_finished(
    datasets: DatasetsStub, service: Service, tmp_path: Path
) -> None:
    parent, data = new(datasets), os.urandom(3 * MIB)
    begun = begin(datasets, parent, data)
    assert not datasets.WriteBlob(chunks(begun.upload, data, finish=False)).complete
    (tmp_path / "file").write_bytes(data)
    with Client(service.address) as client:
        assert client.upload_file(parent, tmp_path / "file") == sha256(data)
    assert begin(datasets, parent, data).complete
