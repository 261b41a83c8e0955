"""How stores fail: away, refused, full, damaged, misnamed."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services.finetune.errors import DataLoss, InvalidArgument, PermissionDenied, Unavailable
from services.finetune.store import open_store


def test_damage_in_a_bucket_is_noticed(s3_uri: str, tmp_path: Path) -> None:
    from services.finetune.store.s3 import S3Store

    store = S3Store(s3_uri)
    blob = store.put_blob(b"precious")
    store.quick.put_object(store.bucket, store.blob_key(blob.digest), io.BytesIO(b"precxous"), 8)
    with pytest.raises(DataLoss):
        store.fetch_blob(blob.digest, tmp_path / "copy")
    assert os.listdir(tmp_path) == []


def test_unreachable_is_told_soon() -> None:
    # One port refuses; the other takes connections into its backlog, and nobody ever answers.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (1, silent.getsockname()[1]):
            lost, start = open_store(f"s3://quartet/x?endpoint=http://127.0.0.1:{port}"), time.monotonic()
            with pytest.raises(Unavailable) as error:
                lost.get("a")
            assert error.value.reason == "STORE_UNREACHABLE" and time.monotonic() - start <= 10


def test_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Unavailable):
        open_store((tmp_path / "file" / "store").as_uri())


def test_wrong_secret_is_refused(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(PermissionDenied, match="AWS_SECRET_ACCESS_KEY"):
        open_store(s3_uri).get("a")


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "/tmp",
        "file:relative",
        "file://host/a",
        "file:///a?b=c",
        "s3://",
        "s3://bucket?endpont=http://a",
        "s3://b?endpoint=a",
    ],
)
def test_malformed_uri(uri: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        open_store(uri)
    assert error.value.reason == "STORE_URI_INVALID"


FULL_DISK = """
import hashlib, resource, sys
from pathlib import Path
from services.finetune.errors import ResourceExhausted
from services.finetune.store import open_store
store = open_store(Path(sys.argv[1]).as_uri())
big = bytes(3 << 20)
digest = "sha256:" + hashlib.sha256(big).hexdigest()
Path(sys.argv[2]).write_bytes(big)
upload = store.begin_upload("up", digest, len(big))
# No file may outgrow 1.5 MiB from here on: writing beyond fails as on a full disk, in the middle of a chunk.
resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 19, resource.RLIM_INFINITY))
upload.write(0, big[:1 << 20])
for full in (
    lambda: upload.write(1 << 20, big[:1 << 20]),
    lambda: store.put_blob(big),
    lambda: store.put_file(Path(sys.argv[2])),
    lambda: store.put("key", big),
):
    try:
        full()
    except ResourceExhausted as error:
        assert error.reason == "DISK_FULL"
    else:
        raise AssertionError("a full disk was not noticed")
assert store.stat_blob(digest) is None and store.get("key") is None
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
upload.write(1 << 20, big[1 << 20:])
assert upload.finish().digest == digest
"""


def test_full_disk(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "store"), str(tmp_path / "big")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path / "store" / "tmp") == []
