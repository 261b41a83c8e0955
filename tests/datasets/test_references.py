"""Files by reference: only what the settings allow, copied into the store, from real servers."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from minio import Minio
from quartet.datasets.v1 import datasets_pb2 as pb

from services.finetune.errors import InvalidArgument, NotFound, PermissionDenied, Unavailable
from tests.common.serving import refused
from tests.datasets.conftest import Service
from tests.datasets.wire import new, row, sha256
from tests.seaweed import seaweed

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "data/train-0.jsonl": row("one") * 3,
    "data/test-0.jsonl": row("two"),
    "pictures/1.png": b"1",
    "README.md": b"# it",
    "loader.py": b"raise SystemExit",
    ".gitattributes": b"x",
}
KEPT = sorted(path for path in FILES if not path.startswith(".") and not path.endswith(".py"))


class Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of the hub that its library asks for when it fetches a dataset."""

    fetched: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = urlsplit(self.path).path
        if path == "/api/datasets/org/talk/revision/v1" or path == "/api/datasets/org/talk":
            self._send(200, self._about(), {"Content-Type": "application/json"}, body)
        elif (file := path.removeprefix(f"/datasets/org/talk/resolve/{COMMIT}/")) in FILES:
            self.fetched.extend([file] if body else [])
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(FILES[file]).hexdigest()}"'}
            self._send(200, FILES[file], headers, body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "not there"}, body)

    def _about(self) -> bytes:
        siblings = [{"rfilename": path, "size": len(data)} for path, data in FILES.items()]
        siblings[0]["lfs"] = {"sha256": sha256(FILES["data/train-0.jsonl"])[7:], "size": 1, "pointerSize": 1}
        return json.dumps({"id": "org/talk", "sha": COMMIT, "siblings": siblings}).encode()

    def _send(self, status: int, data: bytes, headers: Mapping[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing to say."""


@pytest.fixture()
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("OneHub", (Hub,), {"fetched": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    yield handler
    server.shutdown()
    server.server_close()


def fetched(service: Service, parent: str, **source: Any) -> dict[str, str]:
    """What an import stored: digest by path."""
    steps = list(service.stub.ImportFiles(pb.ImportFilesRequest(parent=parent, **source)))
    assert steps[-1].done_bytes == steps[-1].total_bytes > 0
    return {f.path: f.digest for step in steps for f in step.files}


def digests(*paths: str) -> dict[str, str]:
    return {path: sha256(FILES[path]) for path in paths}


def test_a_dataset_of_the_hub(hub: type[Hub], tmp_path: Path) -> None:
    service = Service(tmp_path, "--hub-datasets", "on").start()
    parent = new(service.stub)
    found = fetched(service, parent, hub_id="org/talk@v1")
    assert found == digests(*KEPT) and sorted(hub.fetched) == KEPT
    files = [pb.RevisionFile(path=path, digest=digest) for path, digest in found.items()]
    assert service.stub.CommitRevision(pb.CommitRevisionRequest(parent=parent, files=files)).row_count == 4
    # Again: what the hub told the digest of is known, and not fetched.
    hub.fetched.clear()
    train = fetched(service, parent, hub_id="org/talk", include=["data/train*"])
    assert train == digests("data/train-0.jsonl") and hub.fetched == []
    with refused(NotFound, "SOURCE_NOT_FOUND"):
        fetched(service, parent, hub_id="org/nothing")
    with refused(NotFound, "SOURCE_NOT_FOUND"):
        fetched(service, parent, hub_id="org/talk", include=["*.csv"])
    for bad in ("http://127.0.0.1/x", "org", "org/talk/x", "/x", "https:/x"):
        with refused(InvalidArgument, "SOURCE_MALFORMED"):
            fetched(service, parent, hub_id=bad)
    assert service.stop() == 0


def test_a_hub_that_is_silent_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    service = Service(tmp_path, "--hub-datasets", "on").start()
    with refused(Unavailable, "HUB_UNREACHABLE"):
        fetched(service, new(service.stub), hub_id="org/talk")
    assert service.stop() == 0


def test_an_s3_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with seaweed() as (uri, credentials):
        for name, value in credentials.items():
            monkeypatch.setenv(name, value)
        bucket = urlsplit(uri).netloc
        endpoint = uri.partition("endpoint=")[2]
        keys = list(credentials.values())
        client = Minio(urlsplit(endpoint).netloc, keys[0], keys[1], secure=False, region="us-east-1")
        import io

        for path, data in {**FILES, "../up.jsonl": b"x"}.items():
            folder = "secret" if path.startswith("..") else "shared/talk"
            client.put_object(bucket, f"{folder}/{path.removeprefix('../')}", io.BytesIO(data), len(data))
        service = Service(tmp_path, "--import-prefixes", f"s3://{bucket}/shared?endpoint={endpoint}").start()
        parent = new(service.stub)
        assert fetched(service, parent, s3_uri=f"s3://{bucket}/shared/talk/") == digests(*KEPT)
        only = fetched(service, parent, s3_uri=f"s3://{bucket}/shared", include=["talk/data/*"])
        assert set(only) == {"talk/data/train-0.jsonl", "talk/data/test-0.jsonl"}
        for other in ("secret", "", "share", "sharedx"):
            with refused(PermissionDenied, "S3_PREFIX_FORBIDDEN"):
                fetched(service, parent, s3_uri=f"s3://{bucket}/{other}")
        with refused(PermissionDenied, "S3_PREFIX_FORBIDDEN"):
            fetched(service, parent, s3_uri="s3://other/shared")
        for bad in (
            f"s3://{bucket}/shared/../secret",
            f"s3://{bucket}/shared?endpoint=http://x",
            "http://x/y",
            "s3:///x",
        ):
            with refused(InvalidArgument, "SOURCE_MALFORMED"):
                fetched(service, parent, s3_uri=bad)
        with refused(NotFound, "SOURCE_NOT_FOUND"):
            fetched(service, parent, s3_uri=f"s3://{bucket}/shared/nothing")
        assert service.stop() == 0


def test_a_folder_below_a_root(tmp_path: Path) -> None:
    root, home = tmp_path / "data", tmp_path / "home"
    home.mkdir()
    for path, data in FILES.items():
        (root / "talk" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "talk" / path).write_bytes(data)
    (tmp_path / "secret").write_text("s")
    service = Service(home, "--import-roots", str(root)).start()
    parent = new(service.stub)
    assert fetched(service, parent, directory=str(root / "talk")) == digests(*KEPT)
    one = fetched(service, parent, directory=str(root / "talk" / "README.md"))
    assert one == digests("README.md")
    # A copy: what its owner does to the folder afterwards does not reach the store.
    (root / "talk" / "README.md").write_text("changed")
    assert (root / "talk" / "README.md").stat().st_nlink == 1
    for forbidden in (str(tmp_path / "secret"), str(root / ".." / "secret"), "talk", "/", f"{root}x"):
        with refused(PermissionDenied, "LOCAL_PATH_FORBIDDEN"):
            fetched(service, parent, directory=forbidden)
    (root / "talk" / "link").symlink_to(tmp_path / "secret")
    with refused(PermissionDenied, "LOCAL_PATH_FORBIDDEN"):
        fetched(service, parent, directory=str(root / "talk"))
    with refused(NotFound, "SOURCE_NOT_FOUND"):
        fetched(service, parent, directory=str(root / "nothing"))
    assert service.stop() == 0


def test_nothing_is_allowed_that_no_setting_names(tmp_path: Path) -> None:
    service = Service(tmp_path).start()
    parent = new(service.stub)
    with refused(PermissionDenied, "HUB_FORBIDDEN"):
        fetched(service, parent, hub_id="org/talk")
    with refused(PermissionDenied, "S3_PREFIX_FORBIDDEN"):
        fetched(service, parent, s3_uri="s3://bucket/x")
    with refused(PermissionDenied, "LOCAL_PATH_FORBIDDEN"):
        fetched(service, parent, directory=str(tmp_path))
    with refused(InvalidArgument, "SOURCE_MISSING"):
        fetched(service, parent)
    with refused(NotFound, "DATASET_NOT_FOUND"):
        fetched(service, f"{parent}x", hub_id="org/talk")
    assert service.stop() == 0
