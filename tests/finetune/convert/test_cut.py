"""Conversions by the worker itself: progress in bytes, and what is left when one is stopped, on both stores."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from services.finetune.__main__ import work
from services.finetune.config import to_json
from services.finetune.orders import ArtifactRef, ConvertRun, ImportTask, MergeTask
from services.finetune.progress import attempt_key, dump, raise_fence, read_outcome, read_segments, run_uri
from services.finetune.store import Store, open_store
from services.finetune.store.artifacts import Parent, publish_directory
from tests.inference.published import meta, tiny_adapter

KEY = "jobs/w.conversionJobs.c.0"


class After(threading.Event):
    """Is set once it was looked at so many times."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def is_set(self) -> bool:
        self.looks -= 1
        if self.looks < 0:
            self.set()
        return super().is_set()


def order(store: Store, **task: Any) -> str:
    """Write an order; its URI."""
    raise_fence(store, KEY, 1)
    run = ConvertRun(job="workspaces/w/conversionJobs/c", **task)
    store.put(f"{attempt_key(KEY, 1)}/run.json", dump(to_json(run)))
    return run_uri(store.uri, KEY, 1)


def told(store: Store) -> list[tuple[int, int]]:
    """(bytes done, bytes in all) of each progress event."""
    events = [e for _, segment in read_segments(store, KEY, 1, -1) for e in segment]
    return [(e["done_bytes"], e["total_bytes"]) for e in events if e["type"] == "progress"]


def outcome(store: Store) -> str:
    found = read_outcome(store, KEY)
    assert found is not None
    return found[1].state


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where workers have their folders: a place of its own, so that what they leave is seen."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.fixture()
def store(store_uri: str) -> Store:
    """Of each kind, unlike the other tests' here."""
    return open_store(store_uri)


@pytest.fixture(scope="module")
def lora(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_adapter(llama, tmp_path_factory.mktemp("models") / "adapter", 1)


def task(store: Store, kind: str, llama: Path, lora: Path) -> dict[str, Any]:
    if kind in ("plain", "cast"):
        return {"import_model": ImportTask(local_path=str(llama), dtype="bfloat16" if kind == "cast" else "")}
    base = ArtifactRef(name="base", digest=publish_directory(store, "base", llama, meta=meta()))
    if kind == "revision":
        return {"import_model": ImportTask(source=base)}
    made = publish_directory(store, "adapter", lora, [Parent("base", base.digest, "base")], meta())
    return {"merge": MergeTask(adapter=ArtifactRef(name="adapter", digest=made), base=base)}


@pytest.mark.parametrize("kind", ["plain", "cast", "revision", "merge"])
def test_progress_is_in_bytes_and_rises_to_all(file_store: Store, llama: Path, lora: Path, kind: str) -> None:
    assert work("convert", order(file_store, **task(file_store, kind, llama, lora)), threading.Event()) == 0
    seen = told(file_store)
    assert outcome(file_store) == "SUCCEEDED" and seen == sorted(seen) and len(seen) > 2
    (total,) = {total for _, total in seen}
    size = (llama / "model.safetensors").stat().st_size
    assert seen[-1][0] == total and total > size * (0.45 if kind == "cast" else 0.95)


@pytest.mark.parametrize("looks", [0, 4])
@pytest.mark.parametrize("kind", ["plain", "cast", "merge"])
def test_one_that_is_stopped_leaves_nothing_half_made(
    store: Store, llama: Path, lora: Path, scratch: Path, kind: str, looks: int
) -> None:
    uri = order(store, **task(store, kind, llama, lora))
    before = {e.key for e in store.list("manifests/")}
    assert work("convert", uri, After(looks)) == 0
    assert outcome(store) == "CANCELLED"
    assert {e.key for e in store.list("manifests/")} == before
    assert not list(store.leftovers(time.time() + 3600, drop=False)) and not list(scratch.glob("quartet-*"))
    for blob in store.list_blobs():
        assert hashlib.sha256(b"".join(store.read_blob(blob.digest))).hexdigest() == blob.digest[7:]


# ---------------------------------------------------------------------------------------------- from a hub

COMMIT = "f" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """The answers of the hub that its library asks for when it fetches a model; weights come as slowly as `pause_s`
    between pieces says."""

    files: dict[str, bytes]
    pause_s: float

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = urlsplit(self.path).path
        if path == "/api/models/org/tiny":
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
            about = json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode()
            self._send(about, {"Content-Type": "application/json"}, body)
        else:
            data = self.files[path.removeprefix(f"/org/tiny/resolve/{COMMIT}/")]
            self._send(data, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, body)

    def _send(self, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        for at in range(0, len(data) if body else 0, 1 << 20):
            self.wfile.write(data[at : at + (1 << 20)])
            time.sleep(self.pause_s if len(data) > 1 << 20 else 0)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing to say."""


@pytest.fixture()
def hub(llama: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    files = {p.name: p.read_bytes() for p in llama.iterdir()} | {"modeling.py": b"raise SystemExit"}
    handler = type("OneHub", (Hub,), {"files": files, "pause_s": 0.0})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    yield handler
    server.shutdown()
    server.server_close()


def worker(uri: str) -> subprocess.Popen[bytes]:
    """The worker as a process of its own: the hub's library reads its settings when it is loaded."""
    return subprocess.Popen([sys.executable, "-m", "services.finetune", "convert", uri])


def test_a_hub_tells_how_far_it_is(file_store: Store, hub: type[Hub], scratch: Path) -> None:
    process = worker(order(file_store, import_model=ImportTask(hub_id="org/tiny")))
    assert process.wait(120) == 0 and outcome(file_store) == "SUCCEEDED"
    seen = told(file_store)
    fetched = sum(len(data) for name, data in hub.files.items() if not name.endswith(".py"))
    assert (0, fetched) in seen and (fetched, fetched) in seen
    assert not list(scratch.glob("quartet-*"))


def test_a_hub_is_left_in_the_middle_of_a_file(file_store: Store, hub: type[Hub], scratch: Path) -> None:
    hub.files["model.safetensors"] = os.urandom(200 << 20)
    hub.pause_s = 0.1
    process = worker(order(file_store, import_model=ImportTask(hub_id="org/tiny")))
    deadline = time.monotonic() + 90
    while not any(done > 0 for done, _ in told(file_store)) or sum(done for done, _ in told(file_store)[-1:]) < 1 << 20:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0 and outcome(file_store) == "CANCELLED"
    assert told(file_store)[-1][0] < 200 << 20 and not list(scratch.glob("quartet-*"))
