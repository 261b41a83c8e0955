"""Exports that are sent: to servers that speak the hub's, S3's and OCI's protocols and check what they are sent."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from services.finetune.errors import Cancelled, FailedPrecondition, PermissionDenied, Unavailable
from services.finetune.orders import ExportTask, ImportTask
from services.finetune.store import Store
from services.finetune.store.artifacts import load
from services.finetune.store.s3 import S3Store
from tests.finetune.convert.conftest import Convert
from tests.finetune.convert.test_export import ref
from tests.seaweed import seaweed

TOKEN = "hf_secret"


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by `route`, which subclasses have; bodies of any kind."""

    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        status, headers, data = self.route(self.command, urlsplit(self.path), self.rfile.read(length))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = handle_any

    def route(self, verb: str, url: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
        raise NotImplementedError

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing to say."""


def serve(handler: type[Handler]) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def as_json(value: Any, status: int = 200, **headers: str) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json", **headers}, json.dumps(value).encode()


# ---------------------------------------------------------------------------------------------- the hub


class Hub(Handler):
    """A hub that takes commits: weights by LFS, the rest inside the commit; only with the token."""

    private: bool
    objects: dict[str, bytes]
    branches: dict[str, dict[str, bytes]]

    def route(self, verb: str, url: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
        host = self.headers["Host"]
        if verb == "PUT" and (oid := url.path.removeprefix("/lfs/")) == hashlib.sha256(body).hexdigest():
            self.objects[oid] = body
            return as_json({})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return as_json({"error": "Invalid credentials"}, 401)
        said = json.loads(body) if body[:1] == b"{" and b"\n" not in body.strip() else {}
        if url.path == "/api/validate-yaml":
            return as_json(
                {"errors": [] if said["content"].startswith("---\nlibrary_name: ") else [{}], "warnings": []}
            )
        if url.path == "/api/repos/create":
            type(self).private = said.get("private", said.get("visibility") == "private")
            return as_json({"url": f"http://{host}/org/model"})
        if url.path.startswith("/api/models/org/model/branch/"):
            self.branches.setdefault(url.path.rpartition("/")[2], {})
            return as_json({})
        if url.path.startswith("/api/models/org/model/preupload/"):
            modes = [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(("safetensors", "gguf")) else "regular",
                      "shouldIgnore": False, "oid": None} for f in said["files"]]  # fmt: skip
            return as_json({"files": modes})
        if url.path == "/org/model.git/info/lfs/objects/batch":
            made = [{"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"http://{host}/lfs/{o['oid']}"}}}
                    for o in said["objects"]]  # fmt: skip
            return as_json({"transfer": "basic", "objects": made})
        if (found := re.fullmatch("/api/models/org/model/commit/(.+)", url.path)) is not None:
            return self._commit(found[1], [json.loads(line) for line in body.splitlines()], host)
        return as_json({"error": "what?"}, 404)

    def _commit(self, branch: str, lines: list[Any], host: str) -> tuple[int, dict[str, str], bytes]:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.branches[branch][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.branches[branch][value["path"]] = self.objects[value["oid"]]
        return as_json({"commitUrl": f"http://{host}/org/model/commit/{'a' * 40}", "commitOid": "a" * 40})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("OneHub", (Hub,), {"objects": {}, "branches": {"main": {}}, "private": False})
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for address in serve(handler):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://{address}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield handler


@pytest.fixture
def base(do: Convert, llama: Path) -> str:
    return do(import_model=ImportTask(local_path=str(llama)))


# The hub's library sends files in a way that its http library would have otherwise.
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_to_a_hub(do: Convert, store: Store, base: str, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    made = load(store, do(export=ExportTask(model=ref(base), destination="hf://org/model@v1")))
    wanted = {f.path: f.digest for f in made.files}
    found = {path: sha256(data) for path, data in hub.branches["v1"].items()}
    lineage = json.loads(hub.branches["v1"]["quartet_manifest.json"])
    assert found.items() >= wanted.items() and len(found) == len(wanted) + 1
    assert lineage["parents"][0]["digest"] == base and not hub.branches["main"]
    assert hub.private and len(hub.objects) == 1, "the weights alone go by LFS"
    do(export=ExportTask(model=ref(base), form="gguf", destination="hf://org/model", public=True))
    assert "m-f16.gguf" in hub.branches["main"] and not hub.private


def test_a_hub_that_refuses_or_is_silent(
    do: Convert, base: str, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(PermissionDenied, match="HF_TOKEN") as caught:
        do(export=ExportTask(model=ref(base), destination="hf://org/model"))
    assert caught.value.reason == "DESTINATION_REFUSED" and "hf_wrong" not in caught.value.message
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(Unavailable):
        do(export=ExportTask(model=ref(base), destination="hf://org/model"))
    assert not hub.branches["main"]


# ---------------------------------------------------------------------------------------------- S3


def test_to_an_s3_prefix(do: Convert, store: Store, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with seaweed() as (uri, credentials):
        for name, value in credentials.items():
            monkeypatch.setenv(name, value)
        place = uri.replace("?", "/models/m?")
        task = ExportTask(model=ref(base), form="hf", destination=place)
        with pytest.raises(Cancelled):
            do(_AfterSome(6), export=task)
        assert not list(S3Store(place).list_files()), "nothing half-sent stays"
        made = load(store, do(export=task))
        found = {key.removeprefix("models/m/"): size for key, size in S3Store(place).list_files()}
        assert {f.path: f.size for f in made.files}.items() <= found.items() and "quartet_manifest.json" in found
        with pytest.raises(FailedPrecondition) as caught:
            do(export=task)
        assert caught.value.reason == "DESTINATION_TAKEN"


class _AfterSome(threading.Event):
    """Set once it was looked at so many times: a cancellation between two files."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def is_set(self) -> bool:
        self.looks -= 1
        return self.looks < 0


# ---------------------------------------------------------------------------------------------- a registry


class Registry(Handler):
    """What the distribution specification says of uploads: pieces in order, digests that hold, manifests of known blobs."""

    blobs: dict[str, bytes]
    uploads: dict[str, bytes]
    manifests: dict[str, bytes]
    password: str

    def route(self, verb: str, url: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
        wanted = "Basic " + base64.b64encode(f"me:{self.password}".encode()).decode()
        if self.password and self.headers.get("Authorization") != wanted:
            return as_json({"errors": [{"code": "UNAUTHORIZED"}]}, 401, **{"WWW-Authenticate": 'Basic realm="it"'})
        if url.path == "/v2/":
            return as_json({})
        kind, _, name = url.path.removeprefix("/v2/team/model/").partition("/")
        if kind == "manifests" and verb == "PUT":
            return self._manifest(name, body)
        if verb == "HEAD":
            return (200 if name in self.blobs else 404), {}, b""
        if verb == "POST":
            number = str(len(self.uploads))
            self.uploads[number] = b""
            return 202, {"Location": f"/v2/team/model/blobs/uploads/{number}"}, b""
        number = name.rpartition("/")[2]
        if verb == "PATCH" and self.headers["Content-Range"].partition("-")[0] != str(len(self.uploads[number])):
            return 416, {}, b""
        self.uploads[number] += body
        if verb == "PATCH":
            return 202, {"Location": url.path}, b""
        (digest,) = parse_qs(url.query)["digest"]
        if sha256(self.uploads[number]) != digest:
            return as_json({"errors": [{"code": "DIGEST_INVALID"}]}, 400)
        self.blobs[digest] = self.uploads[number]
        return 201, {"Location": f"/v2/team/model/blobs/{digest}"}, b""

    def _manifest(self, tag: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        said = json.loads(body)
        for part in [said["config"], *said["layers"]]:
            if len(self.blobs.get(part["digest"], b"")) != part["size"]:
                return as_json({"errors": [{"code": "MANIFEST_BLOB_UNKNOWN"}]}, 404)
        self.manifests[tag] = body
        return 201, {"Docker-Content-Digest": sha256(body)}, b""


@pytest.fixture
def registry() -> Iterator[tuple[str, type[Registry]]]:
    handler = type("OneRegistry", (Registry,), {"blobs": {}, "uploads": {}, "manifests": {}, "password": ""})
    for address in serve(handler):
        yield address, handler


def test_to_a_registry(
    do: Convert,
    store: Store,
    base: str,
    registry: tuple[str, type[Registry]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    address, server = registry
    monkeypatch.setattr("services.finetune.convert.targets._CHUNK_BYTES", 20_000)
    task = ExportTask(model=ref(base), destination=f"oci://{address}/team/model:v1")
    made = load(store, do(export=task))
    manifest = json.loads(server.manifests["v1"])
    layers = {p["annotations"]["org.opencontainers.image.title"]: p["digest"] for p in manifest["layers"]}
    assert {f.path: f.digest for f in made.files}.items() <= layers.items() and "quartet_manifest.json" in layers
    assert manifest["artifactType"].startswith("application/vnd.quartet")
    count = len(server.uploads)
    do(export=task)
    assert len(server.uploads) == count, "what is there is not sent again"
    # With credentials, from Docker's file and nowhere else.
    server.password = "secret-9"
    server.manifests.clear()
    with pytest.raises(PermissionDenied) as caught:
        do(export=task)
    assert caught.value.reason == "DESTINATION_REFUSED" and not server.manifests
    auth = base64.b64encode(b"me:secret-9").decode()
    (tmp_path / "config.json").write_text(json.dumps({"auths": {address: {"auth": auth}}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    do(export=task)
    assert server.manifests.keys() == {"v1"}
    log = b"".join(store.get(e.key).data for e in store.list("jobs/"))  # type: ignore[union-attr]
    assert b"secret-9" not in log and auth.encode() not in log


def test_a_registry_that_is_not_there(do: Convert, base: str) -> None:
    with pytest.raises(Unavailable) as caught:
        do(export=ExportTask(model=ref(base), destination="oci://127.0.0.1:1/team/model"))
    assert caught.value.reason == "REGISTRY_UNREACHABLE"
