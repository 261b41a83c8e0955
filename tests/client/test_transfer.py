"""Bytes up and down over connections that are cut."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import grpc
import pytest
from quartet.conversion.v1 import conversion_pb2, conversion_pb2_grpc

from services.client import Client
from services.client.commands.models import import_name, read_size
from services.client.configs import read_options
from services.client.download import download_model
from services.finetune.errors import DataLoss, InvalidArgument
from tests.client.conftest import Quartet, serving
from tests.datasets.conftest import Service

MIB = 1 << 20
GOOD = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."}]}\n'


class Cutter:
    """A wire to a server that breaks after `limit` bytes have gone up, on each of the first `cuts` connections."""

    def __init__(self, folder: Path, target: str, limit: int, cuts: int) -> None:
        self.address, self.target = f"unix:{folder}/c", target.removeprefix("unix:")
        self.limit, self.cuts, self.sent = limit, cuts, 0
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"{folder}/c")
        self.listener.listen()
        self.ends = [self.listener]
        self.pool = ThreadPoolExecutor(32)
        self.pool.submit(self._accept)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            self.ends += [near, far]
            far.connect(self.target)
            left = self.limit if self.cuts > 0 else 1 << 60
            self.cuts -= 1
            self.pool.submit(self._pump, near, far, left, True)
            self.pool.submit(self._pump, far, near, 1 << 60, False)

    def _pump(self, source: socket.socket, sink: socket.socket, left: int, up: bool) -> None:
        with contextlib.suppress(OSError):
            while left > 0 and (data := source.recv(65536)):
                sink.sendall(data)
                left -= len(data)
                self.sent += len(data) if up else 0
        _hang_up(source, sink)

    def close(self) -> None:
        _hang_up(*self.ends)
        self.pool.shutdown()
        for end in self.ends:
            end.close()


def _hang_up(*ends: socket.socket) -> None:
    for end in ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    running = Service(tmp_path_factory.mktemp("h")).start()
    yield running
    assert running.stop() == 0


def rows(path: Path, size: int) -> Path:
    with path.open("w") as out:
        n = 0
        while out.tell() < size:
            turns = [{"role": "user", "content": f"{n} " + "x" * 2000}, {"role": "assistant", "content": "yes"}]
            out.write(json.dumps({"messages": turns}) + "\n")
            n += 1
    return path


def test_an_upload_goes_on_after_cuts(service: Service, tmp_path: Path) -> None:
    source = rows(tmp_path / "rows.jsonl", 24 * MIB)
    cutter = Cutter(tmp_path, service.address, limit=10 * MIB, cuts=2)
    told: list[tuple[int, int]] = []
    try:
        with Client(cutter.address) as client:
            revision = client.upload_dataset("cut", [source], told=lambda done, total: told.append((done, total)))
    finally:
        cutter.close()
    size = source.stat().st_size
    assert cutter.cuts < 0, "the wire was never cut"
    assert revision.files[0].digest == "sha256:" + hashlib.sha256(source.read_bytes()).hexdigest()
    assert told[-1] == (size, size)
    # Begun anew after each cut it would be 20 MiB more; how much was under way at a cut depends on the machine's load.
    assert cutter.sent < size + 12 * MIB


def test_what_the_store_has_is_not_sent(service: Service, tmp_path: Path) -> None:
    source = rows(tmp_path / "rows.jsonl", 3 * MIB)
    with Client(service.address) as client:
        first = client.upload_dataset("again", [source])
        cutter = Cutter(tmp_path, service.address, limit=1, cuts=0)
        try:
            with Client(cutter.address) as second:
                assert second.upload_dataset("again", [source]).digest == first.digest
        finally:
            cutter.close()
    assert cutter.sent < MIB


def test_a_percent_that_changed_is_a_percent_sent(service: Service, quartet: Quartet, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    lines = [json.dumps({"instruction": os.urandom(400).hex(), "output": "yes"}) + "\n" for _ in range(8000)]
    source.write_text("".join(lines))
    with Client(service.address) as client:
        client.upload_dataset("percent", [source])
    for n in range(0, 8000, 100):
        lines[n] = lines[n].replace("yes", "no")
    source.write_text("".join(lines))
    cutter = Cutter(tmp_path, service.address, limit=1, cuts=0)
    try:
        with Client(cutter.address) as client:
            made = client.upload_dataset("percent", [source])
    finally:
        cutter.close()
    assert made.files[0].digest == "sha256:" + hashlib.sha256(source.read_bytes()).hexdigest()
    assert 0.01 * source.stat().st_size < cutter.sent < 0.02 * source.stat().st_size
    done = quartet("dataset", "diff", "percent", "--json", "--endpoint", service.address)
    assert (done.json["changed_row_count"], done.json["unchanged_row_count"]) == (80, 7920)
    assert "added_row_count" not in done.json
    done = quartet("dataset", "diff", "percent", "--endpoint", service.address)
    assert "~ rows.jsonl" in done.out and "0 added, 0 removed, 80 changed" in done.out
    listed = quartet("dataset", "list", "percent", "--json", "--endpoint", service.address).json["revisions"]
    assert [r["row_count"] for r in listed] == [8000, 8000]
    base = listed[1]["name"]
    done = quartet("dataset", "diff", listed[0]["name"], base, "--json", "--endpoint", service.address)
    assert done.json["changed_row_count"] == 80


def test_a_delta_that_saves_nothing_is_not_sent(service: Service, tmp_path: Path) -> None:
    source = rows(tmp_path / "rows.jsonl", 2 * MIB)
    with Client(service.address) as client:
        client.upload_dataset("other", [source])
        source.write_text(json.dumps({"instruction": "q", "output": os.urandom(MIB).hex()}))
        made = client.upload_dataset("other", [source])
    assert made.files[0].digest == "sha256:" + hashlib.sha256(source.read_bytes()).hexdigest()


def test_folders_keep_their_inside_and_hidden_files_stay(service: Service, quartet: Quartet, tmp_path: Path) -> None:
    folder = tmp_path / "talk"
    for path in ("train.jsonl", "images/1.png", ".git/config", ".DS_Store"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(GOOD if path.endswith(".jsonl") else path)
    more = rows(tmp_path / "more.jsonl", 3000)
    where = ("--endpoint", service.address, "--json")
    # The service may not read this folder itself, so it is uploaded.
    done = quartet("dataset", "create", "folder", str(folder), *where)
    assert [f["path"] for f in done.json["files"]] == ["images/1.png", "train.jsonl"], done.err
    done = quartet("dataset", "upload", "folder", str(folder), str(more), *where)
    assert [f["path"] for f in done.json["files"]] == ["talk/images/1.png", "talk/train.jsonl", "more.jsonl"]
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", folder, "train.jsonl")
    done = quartet("dataset", "upload", "folder", archive, *where)
    assert [f["path"] for f in done.json["files"]] == ["train.jsonl"] and done.json["row_count"] == 1
    (tmp_path / "empty").mkdir()
    assert quartet("dataset", "create", "e", str(tmp_path / "empty"), "--endpoint", service.address).status == 66
    assert quartet("dataset", "create", "e", str(tmp_path / "nothing"), "--endpoint", service.address).status == 66


def test_a_folder_that_the_service_may_read_is_not_sent(quartet: Quartet, tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "talk"
    home.mkdir()
    folder.mkdir()
    (folder / "a.jsonl").write_text(GOOD)
    (folder / "b.png").write_bytes(bytes(4 * MIB))
    service = Service(home, "--import-roots", str(folder)).start()
    cutter = Cutter(tmp_path, service.address, limit=1, cuts=0)
    try:
        done = quartet("dataset", "create", "here", str(folder), "--endpoint", cutter.address, "--json")
        assert done.status == 0 and done.json["row_count"] == 1 and len(done.json["files"]) == 2, done.err
    finally:
        cutter.close()
    assert cutter.sent < MIB
    assert service.stop() == 0


def test_references_are_the_services_to_allow(service: Service, quartet: Quartet) -> None:
    where = ("--endpoint", service.address)
    done = quartet("dataset", "create", "ref", "--hub", "org/talk", *where)
    assert done.status == 77 and "--hub-datasets on" in done.err
    done = quartet("dataset", "create", "ref", "--s3", "s3://bucket/x", *where)
    assert done.status == 77 and "--import-prefixes" in done.err
    for words in ([], ["a.jsonl", "--hub", "org/talk"], ["--hub", "o/t", "--s3", "s3://b/x"]):
        assert quartet("dataset", "create", "ref", *words, *where).status == 2
    assert quartet("dataset", "create", "ref", "a.jsonl", "--include", "*", *where).status == 65


def test_a_datasets_rows_are_repeated_without_its_bytes(service: Service, quartet: Quartet, tmp_path: Path) -> None:
    source = rows(tmp_path / "six.jsonl", 6 * 2040)
    with Client(service.address) as client:
        before = client.upload_dataset("six", [source])
    assert before.row_count == 6
    done = quartet("dataset", "repeat", "six", "-n", "200", "-o", "many", "--endpoint", service.address, "--json")
    assert (done.status, done.json["row_count"]) == (0, 1200), done.err
    assert {f["digest"] for f in done.json["files"]} == {before.files[0].digest}


def test_bad_rows_are_blamed(service: Service, quartet: Quartet, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{"x": 1}\n'
    )
    words = ["dataset", "create", "bad", str(bad), "--format", "openai", "--endpoint", service.address]
    done = quartet(*words)
    assert done.status == 65 and "files[bad.jsonl].rows[2]" in done.err
    done = quartet(*words, "--skip-bad-rows", "--json")
    assert (done.status, done.json["row_count"], done.json["skipped_row_count"]) == (0, 1, 1)


def test_two_files_of_one_name_are_refused_before_anything_is_sent(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("a.jsonl", "b/a.jsonl"):
        (tmp_path / name).touch()
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidArgument, match=r"two files are called a\.jsonl"):
        client.upload_dataset("d", [tmp_path / "a.jsonl", tmp_path / "b" / "a.jsonl"])


class Conversion(conversion_pb2_grpc.ConversionServicer):
    """One model, sent in chunks of 1000 bytes; the wire breaks after `limit` bytes of a call, `cuts` times."""

    def __init__(self, files: dict[str, bytes], cuts: int = 0, corrupt: int = 0) -> None:
        self.files, self.cuts, self.corrupt = files, cuts, corrupt
        self.offsets: list[tuple[str, int]] = []
        listed = [
            conversion_pb2.ModelFile(path=p, digest="sha256:" + hashlib.sha256(d).hexdigest(), size_bytes=len(d))
            for p, d in files.items()
        ]
        size = sum(map(len, files.values()))
        self.model = conversion_pb2.Model(name="workspaces/default/models/m", files=listed, size_bytes=size)

    def GetModel(self, request: Any, context: Any) -> Any:
        return self.model

    def DownloadModel(self, request: Any, context: Any) -> Iterator[Any]:
        self.offsets.append((request.path, request.offset_bytes))
        data = self.files[request.path][request.offset_bytes :]
        for at in range(0, len(data), 1000):
            if at == 3000 and self.cuts:
                self.cuts -= 1
                context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
            piece = data[at : at + 1000]
            crc = google_crc32c.value(piece) ^ (1 if self.corrupt else 0)
            self.corrupt = max(0, self.corrupt - 1)
            yield conversion_pb2.DownloadModelResponse(data=piece, crc32c=crc)

    def add(self, server: grpc.Server) -> None:
        conversion_pb2_grpc.add_ConversionServicer_to_server(self, server)


def conversion_of(files: dict[str, bytes], cuts: int = 0, corrupt: int = 0) -> Conversion:
    # What it leaves out answers UNIMPLEMENTED, as gRPC has it.
    return Conversion(files, cuts, corrupt)  # type: ignore[abstract]


FILES = {"config.json": b"{}", "empty": b"", "sub/model.safetensors": bytes(range(256)) * 40}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.client.download.pause_s", lambda attempt: 0.0)


def test_a_download_goes_on_after_cuts_and_is_verified(quartet: Quartet, tmp_path: Path) -> None:
    conversion = conversion_of(FILES, cuts=2, corrupt=1)
    with serving(conversion.add) as address:
        done = quartet("model", "download", "m", str(tmp_path), "--endpoint", address, "--json")
        assert done.status == 0, done.err
        assert {p: (tmp_path / p).read_bytes() for p in FILES} == FILES
        large = [offset for path, offset in conversion.offsets if path.startswith("sub/")]
        # The first chunk to be damaged may be its or another file's: they come at the same time.
        assert large in ([0, 3000, 6000], [0, 0, 3000, 6000])
        assert json.loads((tmp_path / "quartet_manifest.json").read_text())["name"] == conversion.model.name
        assert not list(tmp_path.rglob("*.part"))
        # Again: only what is not as it should be.
        (tmp_path / "config.json").write_bytes(b"[]")
        conversion.offsets.clear()
        assert quartet("model", "download", "m", str(tmp_path), "--endpoint", address).status == 0
        assert conversion.offsets == [("config.json", 0)] and (tmp_path / "config.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("left", "offsets"),
    [
        (FILES["sub/model.safetensors"][:5000], [5000]),
        (FILES["sub/model.safetensors"], []),
        (b"damaged" * 100, [700, 0]),
        (b"longer" * 5000, [0]),
        (b"x" * len(FILES["sub/model.safetensors"]), [0]),
    ],
    ids=["cut", "whole", "damaged", "longer", "wrong"],
)
def test_what_an_earlier_download_left(tmp_path: Path, left: bytes, offsets: list[int]) -> None:
    """A process that was killed leaves a part; it is gone on with only if it proves to be right."""
    conversion = conversion_of(FILES)
    digest = hashlib.sha256(FILES["sub/model.safetensors"]).hexdigest()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / f"model.safetensors.{digest[-12:]}.part").write_bytes(left)
    told: list[int] = []
    with serving(conversion.add) as address, Client(address) as client:
        download_model(client, conversion.model, tmp_path, lambda done, total: told.append(done))
    assert [offset for path, offset in conversion.offsets if path.startswith("sub/")] == offsets
    assert {p: (tmp_path / p).read_bytes() for p in FILES} == FILES and not list(tmp_path.rglob("*.part"))
    assert told[-1] == conversion.model.size_bytes


def test_a_server_cannot_write_outside_the_folder(tmp_path: Path) -> None:
    for path in ("../evil", "/tmp/evil", "a/../../evil"):
        conversion = conversion_of({"good": b"1", path: b"2"})
        with serving(conversion.add) as address, Client(address) as client:
            with pytest.raises(InvalidArgument) as caught:
                download_model(client, conversion.model, tmp_path / "in")
            assert caught.value.reason == "PATH_UNSAFE"
    assert not list(tmp_path.rglob("*evil*")) and not (tmp_path / "in").exists()


def test_wrong_bytes_are_not_kept(tmp_path: Path) -> None:
    conversion = conversion_of(FILES)
    conversion.files = {**FILES, "config.json": b"xx"}
    with serving(conversion.add) as address, Client(address) as client, pytest.raises(DataLoss) as caught:
        download_model(client, conversion.model, tmp_path)
    assert caught.value.reason == "BLOB_CORRUPT" and not list(tmp_path.rglob("config*"))


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2_000_000_000), ("500MB", 500_000_000), ("1.5 gb", 1_500_000_000), ("1GiB", 1 << 30), ("10", 10)],
)
def test_sizes(text: str, size: int) -> None:
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "GB", "2XB", "nan", "0.1", "9" * 400 + "TB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(InvalidArgument):
        read_size(text)


def test_names_by_source() -> None:
    assert import_name("Qwen/Qwen2.5-0.5B-Instruct") == "qwen2-5-0-5b-instruct"
    assert import_name("/m/SmolLM2-135M-Instruct.Q4_1.gguf") == "smollm2-135m-instruct-q4-1"
    assert import_name("o/n@v1.0") == "n"
    assert import_name("models/7b/") == "m-7b"
    with pytest.raises(InvalidArgument):
        import_name("o/——")


def test_options() -> None:
    assert read_options(["a.b=1e-3", "c=True", "d=[1, 2]", "e=x=y", 'f="1"', "g=NaN", "h="]) == {
        "a.b": 1e-3,
        "c": True,
        "d": [1, 2],
        "e": "x=y",
        "f": "1",
        "g": "NaN",
        "h": "",
    }
    for wrong in ("a", "=1"):
        with pytest.raises(InvalidArgument):
            read_options([wrong])


def test_where_paths_mean_the_same() -> None:
    for address, local in {
        "127.0.0.1:1": True,
        "localhost:1": True,
        "[::1]:1": True,
        "unix:/s": True,
        "10.0.0.1:1": False,
        "127.0.0.1.example.org:1": False,
        "gpu:50050": False,
    }.items():
        with Client(address) as client:
            assert client.is_local("conversion") == local, address
