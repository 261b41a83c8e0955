"""Downloads from a real S3 server itself, by links that the conversion service signed."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
from quartet.conversion.v1 import conversion_pb2 as pb
from quartet.conversion.v1.conversion_pb2_grpc import ConversionStub

from services.client import Client, direct
from services.client.download import download_model
from services.common.server import Room
from services.common.settings import Settings
from services.conversion.__main__ import build
from services.conversion.usecases import Conversion
from services.finetune.errors import DataLoss, OutOfRange
from services.finetune.store import open_store
from services.finetune.store.s3 import S3Store
from tests.common.serving import W, put_model, refused, serve

TEXT = "m" + "0123456789" * 6
"""A model's name: put_model makes its large file of it."""
BYTES = TEXT.encode() * 200_000
DIGEST = "sha256:" + hashlib.sha256(BYTES).hexdigest()
NAME = f"{W}/models/{TEXT}"
FILE = "model.safetensors"


def room(home: Path, uri: str, direct_downloads: str = "on") -> Room:
    return build(Settings(home=str(home), store_uri=uri, direct_downloads=direct_downloads).completed())


def fetch(home: Path, out: Path) -> bytes:
    """A model's large file, as `quartet model download` fetches it."""
    with Client(f"unix:{home}/s") as client:
        download_model(client, client.conversion.GetModel(pb.GetModelRequest(name=NAME)), out)
    return (out / FILE).read_bytes()


@pytest.fixture
def store(s3_uri: str) -> S3Store:
    made = open_store(s3_uri)
    assert isinstance(made, S3Store)
    put_model(made, TEXT)
    return made


@pytest.fixture
def through(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The offsets from which the service itself was asked for bytes of the large file."""
    found: list[int] = []
    download = Conversion.download

    def counted(self: Conversion, name: str, path: str, offset: int) -> Any:
        found.extend([offset] if path == FILE else [])
        return download(self, name, path, offset)

    monkeypatch.setattr(Conversion, "download", counted)
    return found


def test_large_files_come_from_the_store_itself(
    store: S3Store, s3_uri: str, tmp_path: Path, through: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, asked, get = tmp_path / "out", list[int](), direct._get

    def counted(url: str, start: int, *more: Any, **named: Any) -> bytes | None:
        asked.append(start)
        return get(url, start, *more, **named)

    monkeypatch.setattr(direct, "_get", counted)
    with serve(room(tmp_path, s3_uri), tmp_path) as channel:
        assert fetch(tmp_path, out) == BYTES
        assert through == [] and sorted(asked) == [0, 8 << 20]
        # What a cut download left is gone on with.
        part = out / f"{FILE}.{DIGEST[-12:]}.part"
        (out / FILE).rename(part)
        os.truncate(part, 3_000_000)
        asked.clear()
        assert fetch(tmp_path, out) == BYTES and through == [] and min(asked) == 3_000_000
        stub = ConversionStub(channel)
        for offset, links in ((-1, 0), (0, 1), (len(BYTES) - (8 << 20), 0), (len(BYTES) + 1, 0)):
            ask = pb.DownloadModelRequest(name=NAME, path=FILE, offset_bytes=offset, direct=True)
            if links:
                (answer,) = stub.DownloadModel(ask)
                assert answer.url.startswith("http") and not answer.data
            elif 0 <= offset <= len(BYTES):
                assert not next(iter(stub.DownloadModel(ask))).url  # too little for a link
            else:
                with refused(OutOfRange, "OFFSET_WRONG"):
                    list(stub.DownloadModel(ask))


def test_where_the_store_is_out_of_reach_the_service_goes_on(
    store: S3Store, s3_uri: str, tmp_path: Path, through: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    get, count = direct._get, itertools.count()
    with serve(room(tmp_path, s3_uri), tmp_path):
        monkeypatch.setattr(direct, "_get", lambda *args, **more: get(*args, **more) if next(count) == 0 else None)
        assert fetch(tmp_path, tmp_path / "cut") == BYTES and through == [8 << 20]
        monkeypatch.setattr(S3Store, "link_blob", lambda *_: "http://127.0.0.1:9/nobody")
        monkeypatch.setattr(direct, "_get", get)
        assert fetch(tmp_path, tmp_path / "gone") == BYTES and through == [8 << 20, 0]


def test_links_are_a_setting(store: S3Store, s3_uri: str, tmp_path: Path, through: list[int]) -> None:
    with serve(room(tmp_path, s3_uri, "off"), tmp_path):
        assert fetch(tmp_path, tmp_path / "out") == BYTES and through == [0]


def test_what_the_store_gives_is_checked(store: S3Store, s3_uri: str, tmp_path: Path) -> None:
    damaged = BYTES[:-1] + b"!"
    store.patient.put_object(store.bucket, store.blob_key(DIGEST), io.BytesIO(damaged), len(damaged))
    with serve(room(tmp_path, s3_uri), tmp_path), pytest.raises(DataLoss) as caught:
        fetch(tmp_path, tmp_path / "out")
    assert caught.value.reason == "BLOB_CORRUPT" and not list((tmp_path / "out").glob(f"{FILE}*"))
